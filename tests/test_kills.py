"Runs that are stopped or killed at random moments, from their first line to their last figure."
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from processes import SMALL, same_run

from dino_nb.checkpoint import load_checkpoint

WORDS = SMALL + ['--depth', '2', '--drop-path-rate', '0.2', '--checkpoint-steps', '5',
                 '--workers', '1', '--out', 'run']
SEED, TIMES = 10, 6
SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT

pytestmark = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='looks at /proc')


@pytest.fixture(scope='module')
def whole(images, job, tmp_path_factory):
    "A run that nobody interrupted, and how many seconds it took"
    folder = tmp_path_factory.mktemp('whole')
    job(WORDS + ['--data', images], folder, figures=True)
    status, _, err, seconds = job.end(timeout=300)
    assert status == 0, err
    return folder/'run', seconds


def check_stop(name, status, out, err, folder):
    "One line that says where, a checkpoint of that step, status 0"
    assert status == 0 and not err, err
    if (folder/'summary.json').exists(): return
    lines = [line for line in out.splitlines() if ': stopped ' in line]
    assert len(lines) == 1 and lines[0].startswith(name) and lines[0] == out.splitlines()[-1], out
    found = folder/'checkpoint.pt'
    if 'before the run began' in lines[0]: return
    step = int(lines[0].split('after step ')[1].split()[0])
    assert step == (load_checkpoint(found)['step'] if found.exists() else 0), lines


@pytest.mark.parametrize('graceful', [True, False], ids=['stopped', 'killed'])
def test_whenever_it_ends_it_goes_on_exactly(images, job, whole, tmp_path, graceful):
    "Interrupted again and again, at moments drawn by chance, it equals the run left alone"
    draw, folder = random.Random(f'{SEED} {graceful}'), tmp_path/'run'
    for _ in range(TIMES):
        pid = job(WORDS + ['--data', images], tmp_path, figures=True)
        time.sleep(draw.uniform(0, whole[1] * 0.8))
        number = draw.choice(SIGNALS) if graceful else signal.SIGKILL
        try: os.kill(pid, number)
        except ProcessLookupError: pass  # it was over
        status, out, err, seconds = job.end()
        print(number.name, f'{seconds:.1f} s', out.splitlines()[-1:])
        assert seconds < 20
        if graceful: check_stop(number.name, status, out, err, folder)
        if (folder/'summary.json').exists():
            same_run(whole[0], folder)
            shutil.rmtree(folder)
    job(WORDS + ['--data', images], tmp_path)
    status, _, err, _ = job.end(timeout=300)
    assert status == 0, err
    same_run(whole[0], folder)


def test_a_broken_checkpoint_is_replaced_by_the_one_before(images, job, whole, tmp_path):
    words, folder = WORDS + ['--data', images], tmp_path/'run'
    pid = job(words, tmp_path)
    job.reach(folder/'checkpoint_last_good.pt')
    os.kill(pid, signal.SIGKILL)
    assert job.end()[0] == -signal.SIGKILL
    data = (folder/'checkpoint_last_good.pt').read_bytes()
    (folder/'checkpoint.pt').write_bytes(data[:len(data) // 2])
    status, out, err = job.run(words, tmp_path)
    assert status == 0 and 'cut short' in out and 'the one before it' in out and not err, err
    assert (folder/'checkpoint_damaged.pt').exists()
    same_run(whole[0], folder)
    for name in ('checkpoint.pt', 'checkpoint_last_good.pt'): (folder/name).write_text('foreign')
    (folder/'summary.json').unlink()
    status, out, err = job.run(words, tmp_path)
    assert status == 2 and 'no checkpoint' in err and len(err.strip().splitlines()) == 1, err


def test_a_full_disk_stops_nothing(images, job, whole, small_disk, tmp_path):
    folder = small_disk.path/'run'
    job(WORDS + ['--data', images, '--out', folder], tmp_path)
    job.reach(folder/'checkpoint.pt')
    small_disk.fill()                                      # the next checkpoint does not fit
    job.reach(tmp_path/'out', 'could not be written')
    small_disk.empty()
    status, out, err, _ = job.end(timeout=120)
    assert status == 0 and not err, err
    lines = [line for line in out.splitlines() if 'could not be written' in line]
    assert lines and all('No space left' in line for line in lines), out
    assert 'what was there is kept' in out
    same_run(whole[0], folder)
