"What the tests of the script share: how to start it, wait for it, and compare two of its runs."
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch

from dino_nb.checkpoint import load_checkpoint

SCRIPT = Path(__file__).parent.parent/'dino_nb'/'train.py'
SMALL = ('--depth 1 --embed-dim 64 --num-heads 2 --batch-size 16 --epochs 4 --warmup-epochs 1 '
         '--freeze-last-layer 1 --log-every 3 --knn-every 2 --workers 0 --device cpu').split()
MODULE = [sys.executable, '-m', 'dino_nb.train']
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


def start(command, cwd, **kwargs):
    env = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg')
    return subprocess.Popen(list(map(str, command)), cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def run(command, cwd):
    "Exit status, what was printed, what was complained about"
    process = start(command, cwd)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def call(words, cwd, seconds=60, main=None):
    """What `run` returns for the script with these words, by a fork of this process: the 7 s that
    imports take are paid once. A child that hangs or leaves a process behind is told as such."""
    from dino_nb import train
    from dino_nb.settings import setting_docs
    setting_docs()            # read once, for all forks
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with warnings.catch_warnings(action='ignore'): child = os.fork()
        if not child: _become(main or train.main, list(map(str, words)), cwd, out, err)
        end = time.time() + seconds
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.time() < end:
            time.sleep(0.002)
        try: os.killpg(child, signal.SIGKILL)
        except ProcessLookupError: left = not ended[0]
        else: left = True
        if not ended[0]: os.waitpid(child, 0)
        texts = [(file.seek(0), file.read().decode(errors='replace'))[1] for file in (out, err)]
    if left: return ('hangs' if not ended[0] else 'leaves a process'), *texts
    return os.waitstatus_to_exitcode(ended[1]), *texts


def call_many(many, cwd):
    "What `call` returns for each of many lists of words, by one fork for all that end by themselves"
    from dino_nb import train

    def serve(_):
        for words in many:
            status = 0
            try: train.main(words)
            except SystemExit as error: status = error.code or 0
            for file in (sys.stdout, sys.stderr): file.write(f'\0{status}\0')

    status, *texts = call([], cwd, seconds=20 * len(many), main=serve)
    out, err = (text.split('\0') for text in texts)  # text, status, text, status, ..., rest
    if status or len(out) != 2 * len(many) + 1: return [call(words, cwd) for words in many]
    return list(zip(map(int, out[1::2]), out[0::2], err[0::2]))


def _become(main, words, cwd, out, err):
    "The child's part: run the script and end, whatever happens"
    status = 1
    try:
        os.setpgid(0, 0)
        os.chdir(cwd)
        for file, number in ((out, 1), (err, 2)): os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (open(n, 'w', closefd=False) for n in (1, 2))
        sys.argv = ['dino_train', *words]
        main(words)
        status = 0
    except SystemExit as error: status = error.code or 0
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def places_of(ranks):
    "The environment of each process of several, as a cluster's scheduler sets it"
    with socket.create_server(('localhost', 0)) as free: port = free.getsockname()[1]
    place = dict(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR='localhost',
                 MASTER_PORT=port)
    return [{name: str(value) for name, value in dict(place, RANK=rank, LOCAL_RANK=rank).items()}
            for rank in range(ranks)]


class Forks:
    """Starts the script again and again from one process that has imported everything

    Figures take half the time of a short run: they are drawn where a test asks for them.
    """
    LOOP = """
import json, os, sys
from dino_nb import report, train
def become(folder, words, place, figures):
    if not figures: report.figures = lambda *args: {}
    os.chdir(folder)
    for name, number in ('out', 1), ('err', 2):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(place)
    sys.argv = ['dino_train', *words]
    train.main()
    sys.exit()
for line in sys.stdin:
    folder, words, places, figures = json.loads(line)
    pids = []
    for place in places:
        pids.append(os.fork())
        if not pids[-1]: become(folder, words, place, figures)
    print(*pids, flush=True)
    print(*[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], flush=True)
"""
    def __init__(self): self.process = start([sys.executable, '-c', self.LOOP], '.',
                                             stdin=subprocess.PIPE)

    def __call__(self, words, cwd, ranks=1, figures=False, **env):
        "Start the script in so many processes; return the first one's id once all hear signals"
        self.cwd = Path(cwd)
        for name in ('out', 'err'): (self.cwd/name).unlink(missing_ok=True)
        places = [env] if ranks == 1 else [place | env for place in places_of(ranks)]
        line = json.dumps([str(cwd), list(map(str, words)), places, figures])
        self.process.stdin.write(line + '\n'); self.process.stdin.flush()
        self.pids = list(map(int, self.process.stdout.readline().split()))
        for pid in self.pids:
            while (state := status_of(pid)) and not int(state['SigCgt'], 16) >> 14 & 1:
                time.sleep(0.01)
        return self.pids[0]

    def reach(self, path, text=''):
        "Wait until a file of the run holds a text"
        while status_of(self.pids[0]) and not (path.exists() and text in path.read_text('latin')):
            time.sleep(0.01)

    def end(self, timeout=60):
        "Exit status (of several: a list), what was printed and complained about, the seconds"
        begin = time.monotonic()
        while any(map(status_of, self.pids)) and time.monotonic() < begin + timeout:
            time.sleep(0.02)
        late = [pid for pid in self.pids if status_of(pid)]
        for pid in late: os.kill(pid, signal.SIGKILL)
        statuses = list(map(int, self.process.stdout.readline().split()))
        assert not late, f'{late} do not end'
        out, err = ((self.cwd/name).read_text() for name in ('out', 'err'))
        return statuses if len(statuses) > 1 else statuses[0], out, err, time.monotonic() - begin

    def run(self, words, cwd, ranks=1, **env):
        "What `run` returns for the script with these words"
        self(words, cwd, ranks, **env)
        return self.end(timeout=300)[:3]


def status_of(pid):
    "What /proc says of a process; None if it is gone"
    try: lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    except OSError: return None
    return dict(line.split(':\t', 1) for line in lines)


def family_of(pid):
    "A process and all that descend from it, or that have its session"
    found = [pid]
    for one in found:
        for folder in Path('/proc').glob('[0-9]*'):
            if (status_of(folder.name) or {}).get('PPid', '').strip() == str(one):
                found.append(int(folder.name))
    return found


def same_weights(a, b, part='teacher', atol=0.):
    a, b = load_checkpoint(a/'checkpoint.pt')[part], load_checkpoint(b/'checkpoint.pt')[part]
    assert a.keys() == b.keys()
    for name in a: torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


def carried(steps, lr=5e-4):
    """How far apart weights may come in so many steps because sums were taken in another order

    In double precision a gradient changes by 1e-15 (test_exact.py). Adam divides that by its
    epsilon, 1e-8, where the gradient itself is smaller, and a step moves the weight lr times as
    far. A factor of 100 is for what later steps make of it. An error of the method moves weights
    by lr in a single step.
    """
    return 100 * steps * lr * 1e-15 / 1e-8


PACE = ('images_per_second', 'waiting')
LONG = ['--depth', '2', '--drop-path-rate', '0.2', '--epochs', '16', '--checkpoint-steps', '3']


def wait_for(path, process, text=''):
    "Wait until a file of a running process holds a text"
    while process.poll() is None and not (path.exists() and (not text or text in path.read_text())):
        time.sleep(0.01)


def same_run(a, b):
    "Weights, moments, center and log are equal, bit for bit"
    for part in ('student', 'teacher', 'dino_loss'): same_weights(a, b, part)
    moments = [load_checkpoint(folder/'checkpoint.pt')['optimizer']['state'] for folder in (a, b)]
    for i in moments[0]:
        for name, value in moments[0][i].items(): assert torch.equal(value, moments[1][i][name])
    logs = [[{k: v for k, v in json.loads(line).items() if k not in PACE}
             for line in (folder/'log.jsonl').read_text().splitlines()] for folder in (a, b)]
    assert logs[0] == logs[1]


def workers_of(process):
    "The processes that torchrun started, by rank"
    found = {}
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            parent = int((folder/'stat').read_text().rsplit(') ', 1)[1].split()[1])
            env = (folder/'environ').read_bytes().split(b'\0')
        except (OSError, ValueError): continue
        rank = [int(word[5:]) for word in env if word.startswith(b'RANK=')]
        if parent == process.pid and rank: found[rank[0]] = int(folder.name)
    return found
