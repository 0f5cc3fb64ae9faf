"The script as a user starts it: real processes, real files, real kills."
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import (LONG, MODULE, SCRIPT, SMALL, TORCHRUN, call, carried, run,
                       same_run, same_weights, start, wait_for, workers_of)
from torchvision.transforms.functional import to_pil_image

from dino_nb.checkpoint import load_checkpoint
from dino_nb.data import open_images, probe_split
from dino_nb.dist import StepSampler
from dino_nb.settings import make_config
from dino_nb.shapes import Shapes
from dino_nb.split import CAN_SPLIT
from dino_nb.views import file_views

def test_one_process_and_its_folder(images, tmp_path):
    status, out, err = run(MODULE + ['--data', images, '--out', 'one'] + SMALL, tmp_path)
    assert status == 0, err
    assert '20-NN accuracy  teacher' in out and 'raw pixels' in out and 'random init' in out
    files = {p.name for p in (tmp_path/'one').iterdir()}
    files -= {'checkpoint_last_good.pt'}  # there where half a minute passed before the end
    assert files == {'config.json', 'log.jsonl', 'checkpoint.pt', 'summary.json', 'views.png',
                     'curves.png', 'attention.png'}
    rows = [json.loads(line) for line in (tmp_path/'one'/'log.jsonl').read_text().splitlines()]
    expected = {'step', 'epoch', 'loss', 'teacher_entropy', 'kl', 'ln_k', 'lr', 'weight_decay',
                'teacher_momentum', 'teacher_temp', 'images_per_second', 'waiting', 'verdict'}
    assert all(expected <= row.keys() for row in rows) and any('knn_teacher' in row for row in rows)


def test_two_processes_that_run_the_file(images, tmp_path):
    "By its path; by the module's name in test_ranks_that_die"
    command = TORCHRUN + [SCRIPT, '--data', images, '--precision', 'float32'] + SMALL
    status, out, err = run(command + ['--out', 'two'], tmp_path)
    assert status == 0, err
    assert '2 process(es)' in out and out.count('20-NN accuracy  teacher') == 1


def test_a_batch_that_two_processes_cannot_share(images, tmp_path):
    command = TORCHRUN + ['-m', 'dino_nb.train', '--data', images] + SMALL + ['--batch-size', '15']
    status, out, err = run(command, tmp_path)
    assert status and err.count('15, which 2 processes cannot share equally; make it 14') == 1, err


def test_workers_change_nothing(images):
    config, source, views = make_config(batch_size=16, epochs=2), open_images(images), []
    for workers in (0, 2):
        steps = StepSampler(len(source), config.batch_size, epochs=config.epochs, start_step=4)
        stream = file_views(source, steps, config, 0, torch.device('cpu'), workers)
        views.append([group for batch, _ in stream for group in batch])
    assert len(views[0]) == 2 * 8 and all(map(torch.equal, *views))


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1', 'SIGINT'])
def test_a_signal_writes_a_checkpoint_and_leaves(images, job, tmp_path, name):
    "The way back, after signals and kills at moments drawn by chance, is in test_kills.py"
    folder = tmp_path/'run'
    pid = job(['--data', images, '--out', 'run'] + SMALL + LONG, tmp_path)
    job.reach(folder/'log.jsonl', 'step')
    os.kill(pid, getattr(signal, name))
    status, out, err, _ = job.end()
    assert status == 0 and f'{name}: stopped after step' in out and not err, err
    stopped = int(out.split('stopped after step ')[1].split()[0])
    assert load_checkpoint(folder/'checkpoint.pt')['step'] == stopped < 80


def test_the_second_ctrl_c_ends_at_once(images, job, tmp_path):
    pid = job(['--data', images, '--out', 'run', '--batch-size', '80'] + SMALL[8:]
              + ['--depth', '24', '--embed-dim', '384', '--accumulate', '80'], tmp_path)
    job.reach(tmp_path/'run'/'log.jsonl')               # it is training; a step takes seconds
    time.sleep(1)
    for _ in range(2): os.kill(pid, signal.SIGINT); time.sleep(0.7)
    status, out, err, _ = job.end(timeout=30)
    assert status == 130 and 'Traceback' not in err and 'stopped after' not in out, err


def test_a_collapse_can_end_the_run(images, job, tmp_path):
    "A teacher that is not sharpened answers nothing; the doctor says so, and the run ends with 3"
    tiny = '--global-size 16 --patch-size 8 --n-local 0 --depth 1 --embed-dim 32 --num-heads 2'
    soft = '--warmup-teacher-temp 1 --teacher-temp 1 --epochs 120 --log-every 50 --knn-every 0'
    words = f'{tiny} {soft} --batch-size 8 --cache device --on-collapse stop'.split()
    status, out, err = job.run(['--data', images, '--out', 'run', *words], tmp_path)
    assert status == 3 and 'uniform collapse: stopped after step' in out, err
    assert 'teacher_temp' in out and 'warning: ' in out                # before the first step, too
    files = {path.name for path in (tmp_path/'run').iterdir()}
    assert 'checkpoint.pt' in files and 'summary.json' not in files


def test_without_a_recipe_settings_fit_the_images(images, job, tmp_path):
    words = ['--data', images, '--epochs', '0.5', '--depth', '1', '--device', 'cpu']
    status, out, err = job.run(words + ['--out', 'chosen'], tmp_path)
    assert status == 0, err
    assert 'no --recipe: chosen for 86 images' in out and '  out_dim 64: about 20 images' in out
    assert '  epochs' not in out  # given, so not chosen
    status, out, err = job.run(words + ['--recipe', 'tiny', '--out', 'named'], tmp_path)
    assert status == 2 and 'less than warmup_epochs' in err  # a recipe is taken as it is


needs_split = pytest.mark.skipif(not CAN_SPLIT, reason='this torch is too old for --fsdp')


@needs_split
@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='finds processes in /proc')
def test_split_weights_go_on_after_a_kill_in_any_number_of_processes(images, job, tmp_path):
    words = ['--data', images, '--precision', 'float64'] + SMALL + LONG
    words += ['--drop-path-rate', 0, '--epochs', 8]
    assert job.run(words + ['--out', 'whole'], tmp_path)[0] == 0
    words, folder = words + ['--out', 'run'], tmp_path/'run'
    job(words + ['--fsdp'], tmp_path, ranks=2)
    job.reach(folder/'checkpoint_last_good.pt')
    for rank in job.pids: os.kill(rank, signal.SIGKILL)
    assert job.end()[0] == [-signal.SIGKILL] * 2
    pid = job(words, tmp_path)                                      # a split checkpoint, whole
    job.reach(folder/'log.jsonl', '"step": 15')
    os.kill(pid, signal.SIGTERM)
    status, out, err, _ = job.end()
    assert status == 0 and 'going on at step' in out and 'stopped after' in out, err
    status, out, err = job.run(words + ['--fsdp'], tmp_path, ranks=2)  # a whole checkpoint, split
    assert status == [0, 0] and 'going on at step' in out, err
    for part in ('student', 'teacher', 'dino_loss'):
        same_weights(tmp_path/'whole', folder, part, atol=carried(steps=40))
    found = [json.loads((tmp_path/name/'summary.json').read_text())['knn_teacher']['20']
             for name in ('whole', 'run')]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='finds processes in /proc')
def test_ranks_that_die(images, job, tmp_path):
    "torchrun starts them again as often as it may; then the job ends, and can be taken up"
    words = ['--data', images, '--precision', 'float64'] + SMALL + LONG + ['--epochs', '8']
    assert job.run(words + ['--out', 'whole'], tmp_path, ranks=2)[0] == [0, 0]
    words, folder = words + ['--out', 'run'], tmp_path/'run'
    process = start(TORCHRUN + ['--max-restarts', '1', '-m', 'dino_nb.train'] + words, tmp_path)
    wait_for(folder/'checkpoint_last_good.pt', process)
    os.kill(workers_of(process)[0], signal.SIGKILL)         # the one that writes
    wait_for(folder/'log.jsonl', process, '"step": 18')
    os.kill(workers_of(process)[1], signal.SIGKILL)
    begin = time.time()
    out, err = process.communicate(timeout=90)
    assert process.returncode and time.time() - begin < 60, err
    assert 'going on at step' in out and 'SIGKILL' in err, out + err
    said = err.count('dino_train: the other processes are gone')  # by rank 0, unless torchrun,
    assert said + out.count('SIGTERM: stopped after step') == 1, err  # quicker, asked it to stop
    assert not any(f'dino_nb/{name}.py' in err for name in ('learner', 'loop')), err  # no traceback
    status, out, err = job.run(words, tmp_path, ranks=2)
    assert status == [0, 0] and 'going on at step' in out, err
    same_run(tmp_path/'whole', folder)


@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='finds processes in /proc')
def test_a_signal_stops_two_processes_after_the_same_step(images, job, tmp_path):
    words = ['--data', images, '--out', 'run'] + SMALL + LONG + ['--epochs', '8']
    job(words, tmp_path, ranks=2)
    job.reach(tmp_path/'run'/'log.jsonl', 'step')
    os.kill(job.pids[1], signal.SIGUSR1)                    # only one of them hears it
    status, out, err, _ = job.end()
    assert status == [0, 0] and 'stopped after step' in out, err
    status, out, err = job.run(words, tmp_path, ranks=2)
    assert status == [0, 0] and 'going on at step' in out, err


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
       ('--out taken', 'taken'), ('--out taken --overwrite', 'taken'),
       ('--probe nowhere', 'nowhere'),
       ('--global-size 50 --patch-size 8', '50'), ('--local-scale 0.5 0.1', 'local_scale'),
       ('--n-local -1', 'n_local'), ('--device cuda', 'cuda'),
       ('--epochs inf', 'finite'), ('--out-dim 1', 'out_dim'),
       ('--target sinkhron', 'did you mean sinkhorn'), ('--local-scale 0 0', 'local_scale'),
       ('--target sinkhorn --batch-size 2 --accumulate 2', 'one at a time'),
       ('--use-bn --batch-size 2 --accumulate 2', 'one at a time'),
       ('--loss mse --target sinkhorn', 'which kind mse cannot compare')]


@pytest.mark.parametrize('words,sentence', BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_one_sentence(odd, images, words, sentence):
    "Two of them in a process of their own, the others in a fork of this one: the same in 0.1 s"
    if 'cuda' in words and torch.cuda.is_available(): pytest.skip('this machine has a GPU')
    before = sorted(odd.rglob('*'))
    alone = words in ('--data nowhere', '--teacher-tmp 0.04')
    given, late = words.split(), ('--out ', '--probe', '--loss', '--batch', '--global')
    if any(name in words for name in late): given += ['--data', images]  # which open at once
    status, out, err = run(MODULE + given, odd) if alone else call(given, odd)
    assert status == 2, err
    assert sentence in err and 'Traceback' not in err and len(err.strip().splitlines()) == 1, err
    assert sorted(odd.rglob('*')) == before


def test_bad_files(job, tmp_path):
    "Two truncated files of 600 are left out, wherever they fall; a dozen stop the run"
    shapes, folder = Shapes(600, size=40), tmp_path/'many'
    for i, image in enumerate(shapes.images):
        (folder/f'class_{i % 2}').mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(folder/f'class_{i % 2}'/f'{i:03}.jpg')
    def cut(i):
        path = folder/f'class_{i % 2}'/f'{i:03}.jpg'
        path.write_bytes(path.read_bytes()[:400])
    _, test = probe_split(open_images(folder), test_share=0.1)
    tested = {Path(test.name(i)).name for i in range(len(test))}
    trained = next(i for i in range(600) if f'{i:03}.jpg' not in tested)
    cut(trained); cut(next(i for i in range(600) if f'{i:03}.jpg' in tested))
    words = ['--data', folder] + SMALL + ['--epochs', '1.5']
    status, out, err = job.run(words + ['--out', 'good'], tmp_path)
    assert status == 0, err
    assert f'{trained:03}.jpg' in (tmp_path/'good'/'bad_files.txt').read_text()
    assert 'bad_files.txt' in out and '20-NN accuracy  teacher' in out
    for i in range(trained + 10, trained + 20): cut(i)
    status, out, err = job.run(words + ['--out', 'stopped'], tmp_path)
    assert status != 0 and 'Traceback' not in err
    assert '1%' in err and f'{trained:03}.jpg' in err
