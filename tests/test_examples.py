"The examples as a user starts them, with a cluster that is made of two local processes."
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torchvision.transforms.functional import to_pil_image

from dino_nb.data import open_images
from dino_nb.shapes import Shapes
from dino_nb.shards import open_shards

EXAMPLES = Path(__file__).parent.parent/'examples'

# Stand-ins for SLURM's commands and for the script: they write down how they were called
SRUN = r'''#!/bin/bash
echo "srun $1" >> calls
shift
pids=()
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 "$@" &
    pids+=($!)
done
echo "${pids[@]}" > pids
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
'''
SCONTROL = r'''#!/bin/bash
if [ "$1 $2" == "show hostnames" ]; then printf '127.0.0.1\nother\n'; else echo "$@" >> calls; fi
'''
TRAINER = r'''#!/usr/bin/env python
import os, pathlib, signal, sys, time
def stop(*_): sys.exit(0)
signal.signal(signal.SIGUSR1, stop)
names = 'RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT'.split()
out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])
out.mkdir(parents=True, exist_ok=True)
words = [os.environ[n] for n in names] + sys.argv[1:]
(out/f'task_{os.environ["RANK"]}').write_text(' '.join(words))
time.sleep(float(os.environ['SECONDS_TO_TRAIN']))
if os.environ['RANK'] == '0': (out/'summary.json').touch()
sys.exit(int(os.environ.get('STATUS', 0)))
'''


@pytest.fixture
def cluster(tmp_path):
    "Start the sbatch script as SLURM would, with the stand-ins on the PATH"
    for name, text in dict(srun=SRUN, scontrol=SCONTROL, dino_train=TRAINER).items():
        (tmp_path/'bin').mkdir(exist_ok=True)
        text = text.replace('/usr/bin/env python', sys.executable)
        (tmp_path/'bin'/name).write_text(text); (tmp_path/'bin'/name).chmod(0o755)
    def start(*words, seconds=0, **settings):
        env = os.environ | dict(PATH=f'{tmp_path/"bin"}:{os.environ["PATH"]}', SLURM_JOB_ID='77',
                                SLURM_JOB_NODELIST='node[0-1]', SECONDS_TO_TRAIN=str(seconds))
        return subprocess.Popen(['bash', EXAMPLES/'slurm.sbatch', *words], cwd=tmp_path, text=True,
                                env=env | settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    start.calls = lambda: (tmp_path/'calls').read_text().splitlines()
    return start


def test_sbatch_syntax_and_options():
    assert subprocess.run(['bash', '-n', EXAMPLES/'slurm.sbatch']).returncode == 0
    text = (EXAMPLES/'slurm.sbatch').read_text()
    options = dict(re.findall(r'^#SBATCH --([\w-]+)(?:=(\S+))?', text, flags=re.M))
    assert options['signal'] == 'USR1@120'  # without B: the tasks get it, not the batch shell
    assert options['ntasks-per-node'] == options['gpus-per-node'] and 'requeue' in options
    assert text.index('\n#SBATCH') < text.index('\nout='), 'SLURM reads no options after a command'


def test_sbatch_starts_one_task_per_gpu(cluster, tmp_path):
    process = cluster('runs/a b', '--data', 'shards/{00..09}.tar')
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    for rank in '01':
        words = (tmp_path/'runs'/'a b'/f'task_{rank}').read_text()
        assert words == (f'{rank} 2 {rank} 2 127.0.0.1 20077 --out runs/a b '
                         '--data shards/{00..09}.tar')
    assert cluster.calls() == ['srun --kill-on-bad-exit=1']  # finished: not queued again


def test_sbatch_queues_an_interrupted_run_again(cluster, tmp_path):
    process = cluster('run', seconds=60)
    while len(list(tmp_path.glob('run/task_*'))) < 2: time.sleep(0.05)
    process.send_signal(signal.SIGTERM)     # preemption may reach the batch shell as well
    for pid in (tmp_path/'pids').read_text().split(): os.kill(int(pid), signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and 'not finished' in out, err
    assert cluster.calls()[-1] == 'requeue 77'


def test_sbatch_with_the_real_script(cluster, tmp_path):
    "Two processes are told to stop in the middle; the job is queued again and goes on to the end"
    script = f'#!/bin/bash\nexec {sys.executable} -m dino_nb.train "$@"'
    (tmp_path/'bin'/'dino_train').write_text(script)
    words = ('run --device cpu --depth 1 --embed-dim 48 --num-heads 2 --epochs 4 --log-every 5 '
             '--knn-every 0 --data').split() + ['shards/{000000..000002}.tar']
    for i, image in enumerate(Shapes(60, size=24).images):
        (tmp_path/'images').mkdir(exist_ok=True)
        to_pil_image(image).save(tmp_path/'images'/f'{i}.png')
    make = [sys.executable, EXAMPLES/'make_shards.py', 'images', 'shards', '25']
    assert subprocess.run(make, cwd=tmp_path, capture_output=True).returncode == 0
    log = tmp_path/'run'/'log.jsonl'
    process = cluster(*words, '--batch-size', '4', MPLBACKEND='agg')
    while process.poll() is None and not (log.exists() and log.read_text()): time.sleep(0.05)
    for pid in (tmp_path/'pids').read_text().split(): os.kill(int(pid), signal.SIGUSR1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and 'not finished' in out, err
    assert cluster.calls()[-1] == 'requeue 77'
    process = cluster(*words, '--batch-size', '4', MPLBACKEND='agg')
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and 'going on at step' in out, err
    assert (tmp_path/'run'/'summary.json').exists() and cluster.calls()[-1].startswith('srun')


def test_sbatch_does_not_queue_a_failed_run_again(cluster):
    process = cluster('run', STATUS='2')
    assert 'status 2' in process.communicate(timeout=60)[1] and process.returncode == 2
    assert cluster.calls() == ['srun --kill-on-bad-exit=1']
    process = cluster()
    assert 'folder of the run is missing' in process.communicate(timeout=60)[1]
    assert process.returncode != 0


def test_torchrun_on_two_machines(tmp_path):
    "The command of README.md, twice on this machine, for a script that meets and adds"
    text = (EXAMPLES/'README.md').read_text()
    command = re.search(r'^torchrun .*? -m ', text, flags=re.S | re.M)[0]
    words = command.replace('\\\n', ' ').split()[1:-1]
    changed = {'--nproc-per-node=8': '--nproc-per-node=1', '--max-restarts=3': '--max-restarts=0',
               '--rdzv-endpoint=node0:29400': '--rdzv-endpoint=localhost:29417'}
    assert changed.keys() < set(words)
    (tmp_path/'meet.py').write_text(
        'import torch, torch.distributed as dist\n'
        'dist.init_process_group("gloo"); total = torch.ones(1)\n'
        'dist.all_reduce(total); print(int(total)); dist.destroy_process_group()\n')
    command = [sys.executable, '-m', 'torch.distributed.run', *[changed.get(w, w) for w in words]]
    nodes = [subprocess.Popen(command + ['--local-addr=localhost', 'meet.py'], cwd=tmp_path,
                              text=True, env=os.environ | dict(OMP_NUM_THREADS='1'),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for node in nodes:
        out, err = node.communicate(timeout=120)
        assert node.returncode == 0 and out.strip() == '2', err


def test_make_shards(tmp_path):
    shapes = Shapes(25, size=24)
    kinds = ('jpg', 'JPEG', 'png', 'webp', 'gif', 'bmp', 'tiff', 'ppm')
    for i, (image, label) in enumerate(zip(shapes.images, shapes.labels % 3)):
        (tmp_path/'images'/f'class_{label}').mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(tmp_path/'images'/f'class_{label}'/f'{i}.{kinds[i % 8]}')
    command = [sys.executable, EXAMPLES/'make_shards.py', 'images', 'shards', '10']
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "--data 'shards/{000000..000002}.tar'" in done.stdout
    source = open_shards(tmp_path/'shards'/'{000000..000002}.tar')
    files = open_images(tmp_path/'images')
    look = lambda images: sorted((int(images.labels[i]), images[i].tolist()) for i in range(25))
    assert look(source) == look(files)
    assert source.labels.tolist() != sorted(source.labels.tolist()), 'not shuffled'
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0
