"The ablation runner as a user starts it: real processes, real files, real kills."
import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dino_nb import ablations

COMMAND = [sys.executable, '-m', 'dino_nb.ablations']
SHORT = '--table head_kind --seeds 1 --epochs 0.1'.split()


def start(words, cwd):
    env = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg')
    return subprocess.Popen(COMMAND + words, cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def rows(cwd, table='head_kind'):
    path = cwd/'results'/'ablations'/f'{table}.csv'
    return list(csv.DictReader(path.read_text().splitlines()))


def child(process, row):
    "The number of the process that makes a row, once there is one"
    words = ['pgrep', '-P', str(process.pid), '-f', f'row {row} ']
    for _ in range(2000):
        found = subprocess.run(words, text=True, capture_output=True).stdout
        if found: return int(found)
        time.sleep(0.05)


def test_kills_cost_one_run_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    process = start(SHORT, tmp_path)
    os.kill(child(process, 'with batch norm'), signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1 and err.count('\n') == 1, err
    assert 'head_kind, with batch norm, seed 0: killed by SIGKILL' in err
    first = rows(tmp_path)
    assert [row['row'] for row in first] == ['GELU, no batch norm', 'ReLU']
    assert [json.loads(row['settings']) for row in first] == [{}, dict(activation='relu')]
    assert all(0 < float(row['knn_teacher']) < 1 for row in first)

    process = start(SHORT, tmp_path)
    child(process, 'with batch norm')
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.count('\n') == 1 and 'interrupted' in err, err
    assert 'head_kind: 1 to make' in out and rows(tmp_path) == first

    monkeypatch.chdir(tmp_path)  # from here on in this process, to save time
    ablations.main(SHORT)
    assert rows(tmp_path)[:2] == first and len(rows(tmp_path)) == 3
    ablations.main(SHORT)
    assert 'head_kind: 0 to make' in capsys.readouterr().out and len(rows(tmp_path)) == 3
    with pytest.raises(SystemExit, match='2'): ablations.main(SHORT[:-1] + ['0.2'])
    assert 'of other settings' in capsys.readouterr().err and len(rows(tmp_path)) == 3


def test_an_unknown_table_is_one_sentence(tmp_path):
    process = start(['--table', 'head_knd'], tmp_path)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err.count('\n')) == (2, '', 1)
    assert "table is 'head_knd', which is not known; did you mean head_kind" in err
    assert not list(tmp_path.iterdir())
