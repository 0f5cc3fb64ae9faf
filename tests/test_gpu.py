"benchmarks/gpu.py: every stage runs, at toy size where there is no card, and says what it cannot do."
import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent/'benchmarks'/'gpu.py'


def gpu(*words, **env):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True,
                          text=True, timeout=600, env=os.environ | env)


def test_every_stage_runs_at_toy_size(tmp_path):
    done = gpu('--device', 'cpu', '--minutes', 9, '--out', tmp_path, OMP_NUM_THREADS='1')
    rows = [json.loads(line) for line in (tmp_path/'gpu.jsonl').read_text().splitlines()]
    assert not [row for row in rows if not row['ok']], done.stdout
    assert {row['stage'] for row in rows} == {
        'inventory', 'right', 'compiled', 'runs', 'step', 'whole', 'record'}
    found = {row['check'] for row in rows if 'left_out' not in row}
    assert {'step, float64', 'killed and resumed', 'ours, compiled', 'run, 0 workers'} <= found
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith(f'{len(rows)} of')


def test_what_cannot_run_is_one_sentence(tmp_path):
    for words, said in ((['--out', tmp_path], 'no CUDA device'),
                        (['--device', 'cpu', '--out', '/proc/none'], 'cannot be written'),
                        (['--device', 'cpu', '--only', 'fast', '--out', tmp_path], 'choose from')):
        done = gpu(*words, CUDA_VISIBLE_DEVICES='')
        assert done.returncode == 1 and said in done.stderr and not done.stdout
        assert len(done.stderr.strip().splitlines()) == 1
