"The repository's own rules: what is made from the notebooks, and how they may be written."
import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BOOKS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
NUMBER = {name: number for number, name in (b.stem.split('_', 1) for b in BOOKS)}
MODULES = sorted(p.stem for p in (ROOT/'dino_nb').glob('*.py') if p.stem[0] != '_')
DEV = {'nbdev', 'execnb', 'IPython', 'ipykernel', 'jupyter_client', 'pytest'}
each_book = pytest.mark.parametrize('book', BOOKS, ids=lambda book: book.stem)


def code_cells(book):
    "The code cells of a notebook: (directives, source, outputs)"
    for cell in json.loads(book.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] != 'code': continue
        source = ''.join(cell['source'])
        yield set(re.findall(r'^#\|\s*([\w-]+)', source, flags=re.M)), source, cell['outputs']


def imports(source):
    "The modules that source imports, at any depth, each with the names taken from it"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): yield from ((alias.name, []) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            module = ('dino_nb.' if node.level else '') + (node.module or '')
            yield module, [alias.name for alias in node.names]


def test_modules_are_what_the_notebooks_export(again):
    assert not (files := again.differing('dino_nb/*.py')), f'{files}: nbdev_export, remove orphans'


def test_readme_is_the_front_page(again):
    files = again.differing('README.md') + again.differing('index_files/*')
    assert not files, f'{files}: make docs'


def test_notebooks_are_clean(again):
    assert again.run(Path(sys.executable).parent/'nbdev_clean').returncode == 0
    assert not (files := again.differing('nbs/*.ipynb')), f'{files}: nbdev_clean'


@each_book
def test_a_module_has_the_name_of_its_notebook(book):
    exports = [src.split()[-1] for flags, src, _ in code_cells(book) if 'default_exp' in flags]
    assert exports in ([book.stem.split('_', 1)[1]], [])


@each_book
def test_imports_point_to_lower_numbers(book):
    for _, source, _ in code_cells(book):
        for module, names in imports(re.sub(r'^\s*[%!].*$', '', source, flags=re.M)):
            assert '*' not in names, f'star import of {module}'
            package, _, name = module.partition('.')
            for name in ([name] if name else names) if package == 'dino_nb' else []:
                if name == '__version__': continue
                assert name in NUMBER, f'there is no notebook for dino_nb.{name}'
                assert NUMBER[name] < book.stem, f'{name} is a later notebook'


@each_book
def test_imports_stand_alone(book):
    "The docs build runs a cell again when it imports anything, or is exported"
    for flags, source, _ in code_cells(book):
        if 'eval' in flags or 'nbdev_export()' in source: continue
        cell = ast.parse(re.sub(r'^\s*[%!].*$', '', source, flags=re.M))
        nodes = cell.body if flags & {'export', 'exports'} else list(ast.walk(cell))
        found = any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes)
        alone = all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in cell.body)
        assert alone or not found, f'imports and other code in one cell:\n{source}'


@each_book
def test_lines_fit(book):
    lines = [line for _, source, _ in code_cells(book) for line in source.splitlines()]
    assert not [line for line in lines if len(line) > 100]


@each_book
def test_cells_functions_and_modules_are_short(book):
    exported = 0
    for flags, source, _ in code_cells(book):
        if not flags & {'export', 'exports'}: continue
        lines = [line for line in source.splitlines() if not line.startswith('#|')]
        assert len(lines) <= 40, f'a cell of {len(lines)} lines:\n{source}'
        exported += sum(bool(line.strip()) for line in lines)
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef): continue
            assert node.end_lineno - node.lineno < 30, f'{node.name} is longer than 30 lines'
    assert exported <= 250, f'{exported} exported lines'


@each_book
def test_outputs_are_stored_and_plain(book):
    assert book.stat().st_size <= 500_000
    for flags, source, outputs in code_cells(book):
        shows = re.search(r'^(fig\b.*=|print\()', source, flags=re.M)
        if shows and not flags & {'hide', 'export', 'exports'}:
            assert outputs, f'nothing stored (make notebooks):\n{source}'
        for out in outputs:
            assert out['output_type'] != 'error', f'{out}\n{source}'
            assert out.get('name') != 'stderr' or 'Warning' not in ''.join(out['text']), f'{out}'
            assert 'application/vnd.jupyter.widget-view+json' not in out.get('data', {}), source


IMPORT_ALL = f'''
import importlib, socket, sys
def refuse(*args, **kwargs): raise OSError('an import asks the network')
socket.socket.connect = socket.getaddrinfo = refuse
for module in {MODULES}: importlib.import_module('dino_nb.' + module)
print(*sys.modules)
'''

def test_import_needs_no_network_no_dev_package_and_no_faiss():
    command = [sys.executable, '-c', IMPORT_ALL]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert not {name.split('.')[0] for name in done.stdout.split()} & (DEV | {'faiss'})


def test_requirements_name_every_import():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    text = ' '.join(config['DEFAULT'][name] for name in ('requirements', 'shards_requirements'))
    required = set(re.findall(r'(?:^|\s)([\w-]+)', text))
    called = {'faiss': 'faiss-cpu', 'PIL': 'pillow'} # where package and module differ
    used = {module.split('.')[0] for name in MODULES
            for module, _ in imports((ROOT/'dino_nb'/f'{name}.py').read_text(encoding='utf-8'))}
    used -= sys.stdlib_module_names | {'dino_nb'}
    assert {called.get(module, module) for module in used} <= required
