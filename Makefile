# make demo · make test · make docs · make lab · make notebooks · make clean

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
NBS    ?= $(sort $(wildcard nbs/*.ipynb))
PIP    := $(BIN)/pip --disable-pip-version-check install

.DEFAULT_GOAL := help
.PHONY: help demo test test-notebooks test-repository docs lab notebooks clean

help:
	@echo 'make demo       install, train DINO on the embedded dataset, print the result'
	@echo 'make test       install the dev extra; run notebooks, tests/, docs build and all checks'
	@echo 'make docs       write README.md and the site (_docs/) from the notebooks'
	@echo 'make lab        open the notebooks in JupyterLab'
	@echo 'make notebooks  run notebooks, store their outputs, clean them (NBS=nbs/12_loss.ipynb: one)'
	@echo 'make clean      remove what was built; .venv/ and runs/ stay'
	@echo 'All of them use .venv/, made with python3; another: make demo PYTHON=python3.12'

# Stamps say what is installed; when the files below are newer, it is installed again.
FACTS := settings.ini setup.py pyproject.toml

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "dino_nb needs Python 3.11 or newer, and $(PYTHON) is %d.%d. \
	Name a newer one: make PYTHON=python3.12 $(or $(MAKECMDGOALS),demo)" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@echo 'Now PyTorch and the rest are fetched: on Linux 6 GB of disk and a few minutes, once.'
	@touch $@

$(VENV)/.installed: $(FACTS) | $(VENV)/.made
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(FACTS) | $(VENV)/.made
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.installed $@

# A finished run is shown again, an interrupted one goes on from its checkpoint; from the start: ARGS=--overwrite
demo: $(VENV)/.installed
	$(BIN)/dino_train $(ARGS)

.NOTPARALLEL:
test: test-notebooks test-repository

# As many notebooks as cores run side by side, with one thread each.
test-notebooks: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --timing

test-repository: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n logical --dist loadgroup --durations=5

docs: $(VENV)/.dev
	$(BIN)/python docs/build.py

lab: $(VENV)/.dev
	$(BIN)/jupyter lab nbs

notebooks: $(VENV)/.dev
	$(BIN)/nbdev_export
	$(BIN)/python docs/run_nbs.py $(NBS)
	$(BIN)/nbdev_clean

clean:
	rm -rf _docs _proc build dist *.egg-info .pytest_cache
	find . -path './$(VENV)' -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) \
	  -prune -exec rm -rf {} +
