"The script as a user starts it: real processes, real files, real kills."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from dino_nb.checkpoint import load_checkpoint
from dino_nb.shapes import Shapes

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


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "A folder of 96 JPEGs in two class folders"
    folder, shapes = tmp_path_factory.mktemp('images'), Shapes(96, size=40)
    for i, (image, label) in enumerate(zip(shapes.images, shapes.labels)):
        (folder/f'class_{label % 2}').mkdir(exist_ok=True)
        to_pil_image(image).save(folder/f'class_{label % 2}'/f'{i:03}.jpg')
    return folder


def same_weights(a, b, part='teacher', atol=0.):
    a, b = load_checkpoint(a/'checkpoint.pt')[part], load_checkpoint(b/'checkpoint.pt')[part]
    assert a.keys() == b.keys()
    for name in a: torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


def test_one_process_and_its_folder(images, tmp_path):
    status, out, err = run(MODULE + ['--data', images, '--out', 'one'] + SMALL, tmp_path)
    assert status == 0, err
    assert '20-NN accuracy  teacher' in out and 'raw pixels' in out and 'random init' in out
    files = {p.name for p in (tmp_path/'one').iterdir()}
    assert files == {'config.json', 'log.jsonl', 'checkpoint.pt', 'summary.json', 'views.png',
                     'curves.png', 'attention.png'}
    rows = [json.loads(line) for line in (tmp_path/'one'/'log.jsonl').read_text().splitlines()]
    expected = {'step', 'epoch', 'loss', 'teacher_entropy', 'kl', 'ln_k', 'lr', 'weight_decay',
                'teacher_momentum', 'teacher_temp', 'images_per_second', 'waiting', 'verdict'}
    assert all(expected <= row.keys() for row in rows) and any('knn_teacher' in row for row in rows)


@pytest.mark.parametrize('script', [['-m', 'dino_nb.train'], [SCRIPT]], ids=['module', 'path'])
def test_two_processes(images, tmp_path, script):
    command = TORCHRUN + script + ['--data', images, '--precision', 'float32'] + SMALL
    status, out, err = run(command + ['--out', 'two'], tmp_path)
    assert status == 0, err
    assert '2 process(es)' in out and out.count('20-NN accuracy  teacher') == 1
    if script[0] != '-m': return
    status, out, err = run(MODULE + ['--data', images, '--precision', 'float32', '--out', 'one']
                           + SMALL, tmp_path)
    assert status == 0, err
    # same images, views and center; float32 sums in another order, through 20 Adam steps
    same_weights(tmp_path/'one', tmp_path/'two', atol=2e-3)


def test_workers_change_nothing(images, tmp_path):
    for workers in (0, 2):
        command = MODULE + ['--data', images, '--out', workers] + SMALL + ['--workers', workers]
        assert run(command, tmp_path)[0] == 0
    same_weights(tmp_path/'0', tmp_path/'2')


def test_a_killed_run_goes_on_exactly(images, tmp_path):
    command = MODULE + ['--data', images, '--checkpoint-minutes', '0'] + SMALL + [
        '--depth', '2', '--drop-path-rate', '0.2', '--epochs', '8']
    whole, killed = command + ['--out', 'whole'], command + ['--out', 'killed']
    assert run(whole, tmp_path)[0] == 0
    process = start(killed, tmp_path)
    while not (tmp_path/'killed'/'checkpoint.pt').exists() and process.poll() is None: time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path/'killed'/'summary.json').exists(), 'it was over before it could be killed'
    status, out, err = run(killed, tmp_path)
    assert status == 0 and 'going on at step' in out, err
    for part in ('student', 'teacher', 'dino_loss'): same_weights(tmp_path/'whole', tmp_path/'killed', part)
    logs = [[{k: v for k, v in json.loads(line).items() if k not in ('images_per_second', 'waiting')}
             for line in (tmp_path/name/'log.jsonl').read_text().splitlines()]
            for name in ('whole', 'killed')]
    assert logs[0] == logs[1]


@pytest.fixture
def odd(tmp_path):
    "Things that are not folders of images"
    (tmp_path/'empty').mkdir()
    (tmp_path/'note.txt').write_text('')
    (tmp_path/'page.pdf').write_text('no image')
    (tmp_path/'taken').mkdir(); (tmp_path/'taken'/'thesis.tex').write_text('mine')
    (tmp_path/'lies').mkdir(); (tmp_path/'lies'/'a.jpg').write_text('no image')
    return tmp_path


BAD = [('--data nowhere', 'nowhere'), ('--data empty', 'empty'), ('--data page.pdf', 'page.pdf'),
       ('--data note.txt', 'note.txt'), ('--data lies', 'a.jpg'),
       ('--batch-size 10000', 'batch_size'), ('--recipe tny', 'did you mean tiny'),
       ('--backbone vit_smal_patch16_224', 'vit_small_patch16_224'),
       ('--teacher-tmp 0.04', 'did you mean --teacher-temp'), ('--epochs many', 'many'),
       ('--epochs 1', 'warmup_epochs'), ('--teacher-temp 0', 'teacher_temp'),
       ('--teacher-momentum 1.01', 'teacher_momentum'), ('--center-momentum -1', 'center_momentum'),
       ('--out taken', 'taken'), ('--out taken --overwrite', 'taken'), ('--probe nowhere', 'nowhere'),
       ('--global-size 50', '50'), ('--local-scale 0.5 0.1', 'local_scale'),
       ('--n-local -1', 'n_local'), ('--device cuda', 'cuda')]


@pytest.mark.parametrize('words,sentence', BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_one_sentence(odd, words, sentence):
    if 'cuda' in words and torch.cuda.is_available(): pytest.skip('this machine has a GPU')
    before = sorted(odd.rglob('*'))
    status, out, err = run(MODULE + words.split(), odd)
    assert status == 2, err
    assert sentence in err and 'Traceback' not in err and len(err.strip().splitlines()) == 1, err
    assert sorted(odd.rglob('*')) == before


def test_another_run_is_not_overwritten(images, tmp_path):
    command = MODULE + ['--data', images, '--out', 'run'] + SMALL
    assert run(command, tmp_path)[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path/'run').iterdir()}
    status, _, err = run(command + ['--lr', '0.5'], tmp_path)
    assert status == 2 and 'lr' in err and '0.5' in err
    status, out, _ = run(command, tmp_path)
    assert status == 0 and 'finished' in out
    assert {p.name: p.read_bytes() for p in (tmp_path/'run').iterdir()} == before


def test_bad_files(images, tmp_path):
    "One truncated file of 300 is left out and named; 4 of 300 stop the run"
    shapes, folder = Shapes(300, size=40), tmp_path/'many'
    folder.mkdir()
    for i, image in enumerate(shapes.images): to_pil_image(image).save(folder/f'{i:03}.jpg')
    cut = lambda i: (folder/f'{i:03}.jpg').write_bytes((folder/f'{i:03}.jpg').read_bytes()[:400])
    cut(7)
    status, out, err = run(MODULE + ['--data', folder, '--out', 'good'] + SMALL, tmp_path)
    assert status == 0, err
    assert '007.jpg' in (tmp_path/'good'/'bad_files.txt').read_text() and 'bad_files.txt' in out
    for i in (8, 9, 10): cut(i)
    status, out, err = run(MODULE + ['--data', folder, '--out', 'stopped'] + SMALL, tmp_path)
    assert status != 0 and 'Traceback' not in err
    assert '1%' in err and '007.jpg' in err
