"The ablation runner as a user starts it: real processes, real files, real kills."
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dino_nb import ablations
from dino_nb.rows import COLUMNS, append_row, config_id
from dino_nb.tables import run_settings

COMMAND = [sys.executable, '-m', 'dino_nb.ablations']
SHORT = '--table batch_norm --seeds 1 --epochs 0.1'.split()


def start(words, cwd):
    env = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg')
    return subprocess.Popen(COMMAND + words, cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def rows(cwd, table='batch_norm'):
    path = cwd/'results'/'ablations'/f'{table}.csv'
    return list(csv.DictReader(path.read_text().splitlines()))


def child(process, row):
    "The number of the process that makes a row, once there is one"
    words = ['pgrep', '-P', str(process.pid), '-f', f'row {row} --seed']
    for _ in range(2000):
        found = subprocess.run(words, text=True, capture_output=True).stdout
        if found: return int(found)
        time.sleep(0.05)


def test_kills_cost_one_run_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    path = tmp_path/'results'/'ablations'/'batch_norm.csv'
    settings = run_settings('batch_norm', 'without', 0, 0.1)
    append_row(path, dict.fromkeys(COLUMNS, 0.5) | dict(  # of an earlier call
        table='batch_norm', row='without', seed=0, settings='{}',
        config=config_id(settings)))
    first, = rows(tmp_path)
    process = start(SHORT, tmp_path)
    last = child(process, 'with')
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.count('\n') == 1 and 'interrupted' in err, err
    assert 'batch_norm: 1 to make' in out and not Path(f'/proc/{last}').exists()
    assert rows(tmp_path) == [first]

    def start_and_kill(run, epochs, jobs):
        process = start_run(run, epochs, jobs)
        if run[1] == 'with': os.kill(process.pid, signal.SIGKILL)
        return process

    monkeypatch.chdir(tmp_path)  # from here on in this process, to save time
    start_run = ablations._start_run
    with monkeypatch.context() as patched:
        patched.setattr(ablations, '_start_run', start_and_kill)
        with pytest.raises(SystemExit, match='1'): ablations.main(SHORT)
    said = capsys.readouterr()
    assert 'batch_norm: 1 to make' in said.out and said.err.count('\n') == 1
    assert 'batch_norm, with, seed 0: killed by SIGKILL' in said.err
    assert rows(tmp_path) == [first]

    ablations.main(SHORT); ablations.main(SHORT)
    said = capsys.readouterr()
    assert 'batch_norm: 1 to make' in said.out and 'batch_norm: 0 to make' in said.out
    assert rows(tmp_path)[0] == first
    assert rows(tmp_path)[1]['settings'] == json.dumps(dict(use_bn=True))
    assert all(0 < float(row['knn_teacher']) < 1 for row in rows(tmp_path))
    with pytest.raises(SystemExit, match='2'): ablations.main(SHORT[:-1] + ['0.2'])
    assert 'of other settings' in capsys.readouterr().err and len(rows(tmp_path)) == 2


def test_an_unknown_table_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='2'): ablations.main(['--table', 'batch_nrm'])
    out, err = capsys.readouterr()
    assert (out, err.count('\n')) == ('', 1)
    assert "table is 'batch_nrm', which is not known; did you mean batch_norm" in err
    assert not list(tmp_path.iterdir())
