"What happens to jobs: workers, ranks, disks, pipes and shared memory go away, for real."
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from processes import (MODULE, SMALL, TORCHRUN, call, family_of, run, start, status_of, wait_for,
                       workers_of)

from dino_nb.checkpoint import load_checkpoint
from dino_nb.stop import stoppable

WORDS = SMALL + ['--out', 'run', '--epochs', '400', '--knn-every', '0']
READERS = WORDS + ['--workers', '2']

pytestmark = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='looks at /proc')


def until(path, text, seconds=60):
    "Wait until a file holds a text"
    end = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, f'{path} has no {text}'
        time.sleep(0.02)


def gone(pids, seconds=10):
    "Processes that are still there"
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if status_of(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def accident(job, images, folder, what):
    "Let something happen to a run's first worker while it trains; return how it ended"
    pid = job(READERS + ['--data', images], folder)
    until(folder/'run'/'log.jsonl', '"step": 3')
    family = family_of(pid)
    assert len(family) == 3
    what(pid, family[1])
    status, out, err, seconds = job.end(timeout=60)
    assert seconds < 20 and 'Traceback' not in err and not gone(family), (seconds, err)
    return status, out, err


def test_a_worker_that_is_killed(images, job, tmp_path):
    status, _, err = accident(job, images, tmp_path, lambda pid, worker: os.kill(worker, 9))
    assert status == 1 and err.count('\n') == 1 and 'SIGKILL; if the memory ran out' in err, err
    assert load_checkpoint(tmp_path/'run'/'checkpoint.pt')['step'] >= 3


def test_a_worker_that_stands_still(images, job, tmp_path):
    "As in a mount that stalls: a signal still ends the run, with its last whole step"
    def stall(pid, worker):
        os.kill(worker, signal.SIGSTOP); time.sleep(1); os.kill(pid, signal.SIGTERM)
    status, out, err = accident(job, images, tmp_path, stall)
    assert status == 0 and not err and 'SIGTERM: stopped after step' in out, (out, err)
    step = int(out.split('stopped after step ')[1].split()[0])
    assert load_checkpoint(tmp_path/'run'/'checkpoint.pt')['step'] == step


def test_a_main_process_that_is_killed(images, job, tmp_path):
    "Its workers end, also one that stands still"
    def kill(pid, worker): os.kill(worker, signal.SIGSTOP); os.kill(pid, 9)
    assert accident(job, images, tmp_path, kill)[0] == -9


def test_a_signal_to_all_processes_of_a_job(images, job, tmp_path):
    "As a scheduler sends it: workers deliver until the step is done"
    def everybody(pid, worker):
        for one in reversed(family_of(pid)): os.kill(one, signal.SIGTERM)
    status, out, err = accident(job, images, tmp_path, everybody)
    assert status == 0 and not err and 'SIGTERM: stopped after step' in out, (out, err)


def fork_and_wait(words):
    "Is sent a signal while another's function is called at a fork"
    os.register_at_fork(before=lambda: time.sleep(1))
    try:
        with stoppable([], alone=True):
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            if not os.fork(): os._exit(0)
            time.sleep(9)
    finally: os.wait()


def test_a_signal_where_python_ignores_errors(tmp_path):
    "Others' functions are called at a fork, and what is raised in them goes no further"
    status, out, err = call([], tmp_path, main=fork_and_wait)
    assert status == 0 and out.startswith('SIGUSR1: stopped before') and not err, err


@pytest.mark.parametrize('back', [True, False], ids=['for seconds', 'for good'])
def test_a_folder_of_images_goes_away(images, job, tmp_path, back):
    "As a share does: it is waited for, and if it stays away the run ends with its last whole step"
    data, away = tmp_path/'data', tmp_path/'away'
    shutil.copytree(images, data)
    pid = job(READERS + ['--data', data, '--epochs', '15'], tmp_path)
    until(tmp_path/'run'/'log.jsonl', '"step": 3')
    family = family_of(pid)
    data.rename(away)
    if back: time.sleep(2); away.rename(data)
    status, out, err, seconds = job.end(timeout=90)
    assert 'does not answer (No such file or directory); waiting for it' in err, err
    assert 'Traceback' not in err and not gone(family), err
    if back: assert status == 0 and (tmp_path/'run'/'summary.json').exists(), err
    else:
        assert status == 1 and seconds < 30 and 'does not answer any more' in err, (seconds, err)
        assert load_checkpoint(tmp_path/'run'/'checkpoint.pt')['step'] >= 3
    assert not (tmp_path/'run'/'bad_files.txt').exists()


def test_small_shared_memory(images, tmp_path):
    "8 MB, in a mount of our own: batches take the pipe, and the option to enlarge it is named"
    command = ['unshare', '-m', 'sh', '-c', 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"',
               'sh', *MODULE, '--data', images] + SMALL + '--global-size 224 --local-size 96'.split()
    if not shutil.which('unshare') or subprocess.run(['unshare', '-m', 'true']).returncode:
        pytest.skip('mounts need unshare and its rights')
    command += ['--patch-size', 32, '--epochs', 1, '--warmup-epochs', 0, '--workers', 2]
    status, out, err = run(command + ['--out', 'run'], tmp_path)
    assert status == 0 and '20-NN accuracy  teacher' in out, err
    assert '--shm-size' in err and 'Traceback' not in err and 'Bus error' not in err, err


def test_nobody_reads_what_it_says(images, tmp_path):
    "dino_train | head, a terminal that goes away, and an output on a full disk"
    words = MODULE + ['--data', images] + SMALL + ['--epochs', 1, '--warmup-epochs', 0, '--out']
    process = start(words + ['pipe'], tmp_path)
    process.stdout.readline()
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0 and not process.stderr.read()
    with open('/dev/full', 'w') as full:
        process = subprocess.Popen(list(map(str, words + ['full'])), cwd=tmp_path, stdout=full,
                                   stderr=subprocess.PIPE)
        assert process.wait(timeout=120) == 0 and not process.stderr.read()
    assert all((tmp_path/name/'summary.json').exists() for name in ('pipe', 'full'))


@pytest.mark.parametrize('name,value', [
    ('RANK', 'two'), ('RANK', '5'), ('WORLD_SIZE', '-1'), ('LOCAL_WORLD_SIZE', 'x'),
    ('LOCAL_RANK', '9'), ('MASTER_PORT', '99999999'), ('MASTER_ADDR', 'no such machine'),
    ('TORCHELASTIC_RESTART_COUNT', 'often')])
def test_nonsense_in_the_environment(job_env, name, value):
    status, out, err, seconds = job_env(name, value)
    assert status == 2 and name in err and err.count('\n') == 1 and seconds < 20, err


@pytest.fixture
def job_env(monkeypatch, tmp_path, capfd):
    "The script in a fork of this process, with one variable of a world of two changed"
    def start(name, value):
        for key, usual in dict(WORLD_SIZE='2', RANK='0', LOCAL_RANK='0', MASTER_ADDR='localhost',
                               MASTER_PORT='29555').items(): monkeypatch.setenv(key, usual)
        monkeypatch.setenv(name, value)
        begin = time.monotonic()
        return *call(['--device', 'cpu'], tmp_path), time.monotonic() - begin
    return start


def check_farewell(out, why, folder):
    "One line says where the run stopped, and its checkpoint is of that step"
    assert out.count(f'{why}: stopped after step') == 1, out
    step = int(out.split('stopped after step ')[1].split()[0])
    assert load_checkpoint(folder/'run'/'checkpoint.pt')['step'] == step


def test_torchrun_is_killed(images, tmp_path):
    command = TORCHRUN + ['-m', 'dino_nb.train', '--data', images] + WORDS
    process = start(command, tmp_path)
    wait_for(tmp_path/'run'/'log.jsonl', process, '"step": 3')
    ranks = workers_of(process).values()
    process.kill()
    assert not gone(ranks, 30)
    check_farewell(process.stdout.read(), 'torchrun is gone', tmp_path)


def test_a_rank_that_stands_still(images, job, tmp_path):
    "The other waits in an exchange; asked to stop, it ends with the last whole step"
    job(['--data', images] + WORDS, tmp_path, ranks=2)
    job.reach(tmp_path/'run'/'log.jsonl', '"step": 3')
    os.kill(job.pids[1], signal.SIGSTOP)
    time.sleep(2)
    os.kill(job.pids[0], signal.SIGTERM)
    assert not gone(job.pids[:1], 20)
    os.kill(job.pids[1], signal.SIGKILL)
    status, out, err, _ = job.end()
    assert status == [0, -signal.SIGKILL], err
    check_farewell(out, 'SIGTERM', tmp_path)


def test_one_rank_is_asked_before_the_first_step(images, job, tmp_path):
    "While the ranks share the first k-NN, the word goes round, and all end with status 0"
    job(['--data', images] + WORDS, tmp_path, ranks=2)
    job.reach(tmp_path/'out', 'dino_nb')
    os.kill(job.pids[1], signal.SIGUSR1)
    status, out, err, seconds = job.end()
    assert status == [0, 0] and seconds < 30, err
    assert out.count('SIGUSR1: stopped after step') == 1, out
