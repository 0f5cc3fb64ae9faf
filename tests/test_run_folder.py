"A run's folder: one writer, the same run by any name, damaged files, full disks."
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from dino_nb import report, run, train
from dino_nb.checkpoint import load_checkpoint
from dino_nb.lock import LOCK
from dino_nb.settings import config_record, make_config
from dino_nb.shapes import Shapes
from dino_nb.split import map_state

torch.set_num_threads(1)  # children are forked
SETTINGS = ('--depth 1 --embed-dim 32 --num-heads 2 --out-dim 512 --hidden-dim 64 '
            '--bottleneck-dim 32 --global-size 16 --local-size 8 --patch-size 8 --n-local 1 '
            '--batch-size 8 --epochs 2 --warmup-epochs 0.5 --freeze-last-layer 0.5 --log-every 2 '
            '--knn-every 0 --checkpoint-steps 2 --workers 0 --device cpu').split()


class Child:
    "The script in a forked process, in a folder of its own choice; figures only where wanted"
    def __init__(self, cwd, *words, settings=SETTINGS, figures=lambda *args: {}, **changes):
        self.files = [Path(cwd)/f'.{time.monotonic_ns()}.{name}' for name in ('out', 'err')]
        self.pid = os.fork()
        if self.pid: return
        status = 70
        try:
            os.chdir(cwd)
            for number, file in enumerate(self.files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', closefd=False)
            changes['figures'] = figures
            for name, value in changes.items():
                setattr(train if hasattr(train, name) else report, name, value)
            train.main([*settings, *map(str, words)])
            status = 0
        except SystemExit as error: status = error.code or 0
        except BaseException: traceback.print_exc()
        finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(status)

    def kill(self, number=signal.SIGKILL): os.kill(self.pid, number)

    @property
    def said(self): return [file.read_text() if file.exists() else '' for file in self.files]

    def end(self, seconds=120):
        "Exit status, what was printed, what was complained about"
        limit = time.monotonic() + seconds
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > limit: self.kill(); pytest.fail(f'it hangs: {self.said}')
            time.sleep(0.02)
        out, err = self.said
        for file in self.files: file.unlink(missing_ok=True)
        assert 'Traceback' not in err, err
        return os.waitstatus_to_exitcode(ended[1]), out, err

    def reach(self, path, text=''):
        "Wait until a file holds a text"
        while not (path.exists() and text in path.read_text(errors='replace')):
            assert os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, \
                self.said
            time.sleep(0.01)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    "A folder of 40 JPEGs without labels, so that k-NN takes no time"
    folder = tmp_path_factory.mktemp('data')/'photos'
    folder.mkdir()
    for i, image in enumerate(Shapes(40, size=24).images):
        to_pil_image(image).save(folder/f'{i:02}.jpg')
    return folder


@pytest.fixture(scope='session')
def finished(photos, tmp_path_factory):
    "A whole run, of ten steps"
    folder = tmp_path_factory.mktemp('finished')
    status, _, err = Child(folder, '--data', photos, '--out', 'run', figures=report.figures).end()
    assert status == 0, err
    return folder/'run'


LONG = ['--epochs', 20000]


def test_a_folder_has_one_writer(photos, tmp_path):
    "Whoever comes second is refused and told who was first, with --overwrite too, until he dies"
    words, log = ['--data', photos, '--out', 'run', *LONG], tmp_path/'run'/'log.jsonl'
    first = Child(tmp_path, *words)
    first.reach(log, '"step": 4')
    for more in ([], ['--overwrite']):
        status, _, err = Child(tmp_path, *words, *more).end()
        assert status == 2 and f'in use by process {first.pid} on' in err, err
        assert err.count('\n') == 1 and '--out' in err
    first.kill()
    assert first.end()[0] == -signal.SIGKILL
    assert '"step": 4' in log.read_text() and (tmp_path/'run'/LOCK).exists()
    again = Child(tmp_path, *words)                     # the lock died with its holder
    again.reach(log, f'"step": {json.loads(log.read_text().splitlines()[-1])["step"] + 4}')
    again.kill(signal.SIGTERM)
    status, out, err = again.end()
    assert status == 0 and 'going on at step' in out and not err, err
    assert not (tmp_path/'run'/LOCK).exists()


def test_of_two_runs_that_start_together_one_trains(photos, tmp_path):
    both = [Child(tmp_path, '--data', photos, '--out', 'run', *LONG) for _ in range(2)]
    look, ended = os.WEXITED | os.WNOWAIT | os.WNOHANG, None
    while not ended:
        time.sleep(0.1)
        ended = next((c.pid for c in both if os.waitid(os.P_PID, c.pid, look)), None)
    loser, winner = sorted(both, key=lambda child: child.pid != ended)
    status, _, err = loser.end()
    assert status == 2 and f'in use by process {winner.pid} on' in err, err
    winner.reach(tmp_path/'run'/'log.jsonl', '"step": 4')
    winner.kill(signal.SIGTERM)
    assert winner.end()[0] == 0


def test_a_restart_waits_for_its_predecessor(photos, tmp_path):
    words = ['--data', photos, '--out', 'run', *LONG]
    first = Child(tmp_path, *words)
    first.reach(tmp_path/'run'/'checkpoint.pt')
    second = Child(tmp_path, *words)
    time.sleep(2)
    first.kill(); first.end()
    second.reach(second.files[0], 'going on at step')
    second.kill(); second.end()


def test_what_a_run_or_a_shell_left_is_in_nobodys_way(photos, tmp_path):
    (tmp_path/'run').mkdir()
    for name in ('config.json.tmp', LOCK, 'log.txt', 'nohup.out'):
        (tmp_path/'run'/name).write_text('x')
    status, _, err = Child(tmp_path, '--data', photos, '--out', 'run').end()
    assert status == 0 and not err, err
    names = {path.name for path in (tmp_path/'run').iterdir()}
    assert {'log.txt', 'nohup.out', 'summary.json'} <= names and not names & set(run.LEFTOVERS)


def test_nothing_of_another_project_is_touched(photos, tmp_path):
    folder = tmp_path/'bert'
    for name, text in [('config.json', '{"model_type": "bert"}'), ('checkpoint.pt', 'weights'),
                       ('paper.tex', 'words'), ('photo.jpg', 'pixels'), ('views.png', 'pixels')]:
        folder.mkdir()
        (folder/name).write_text(text)
        for more in ([], ['--overwrite']):
            status, _, err = Child(tmp_path, '--data', photos, '--out', 'bert', *more).end()
            assert status == 2 and name in err and err.count('\n') == 1, err
            assert files_of(folder) == {name: text.encode()}
        shutil.rmtree(folder)


def test_links_are_replaced_and_not_followed(photos, finished, tmp_path):
    folder, mine = tmp_path/'run', tmp_path/'mine'
    shutil.copytree(finished, folder)
    (folder/'summary.json').unlink()
    mine.mkdir()
    for path in list(folder.iterdir()):
        path.rename(mine/path.name); path.symlink_to(mine/path.name)
    for name in ('checkpoint.pt.tmp', 'log.jsonl.tmp', 'config.json.tmp', 'curves.png.tmp'):
        (mine/name).write_text('mine'); (folder/name).symlink_to(mine/name)
    before = files_of(mine)
    words = '--data', photos, '--out', 'run'
    status, out, err = Child(tmp_path, *words, figures=report.figures).end()
    assert status == 0 and 'going on at step 10 of 10' in out and not err, err
    assert files_of(mine) == before
    changed = ('config.json', 'log.jsonl', 'summary.json', 'views.png', 'curves.png')
    assert not any((folder/name).is_symlink() for name in changed)


def test_the_same_images_by_another_name_are_the_same_run(photos, finished, tmp_path):
    shutil.copytree(photos, tmp_path/'copy'/'photos')
    shutil.copytree(finished, tmp_path/'run')
    here, before = ['--out', tmp_path/'run'], files_of(tmp_path/'run')
    for more in (['--data', 'photos/'], ['--data', './photos'], ['--data', photos],
                 ['--data', '../data0/photos'], ['--data', tmp_path/'copy'/'photos'],
                 ['--data', photos, '--knn-every', 3, '--eval-crop', 1, '--log-every', 9]):
        if 'data0' in str(more): more[1] = f'../{photos.parent.name}/photos'
        status, out, err = Child(photos.parent, *here, *more).end()
        assert status == 0 and 'holds this run, finished' in out and not err, err
    old = config_record(make_config(**json.loads(before['config.json'], object_hook=lambda record: {
        name: value for name, value in record.items() if name not in ('images', 'dino_nb')})))
    (tmp_path/'run'/'config.json').write_text(json.dumps(old))  # as the version before wrote it
    assert Child(tmp_path, *here, '--data', tmp_path/'copy'/'photos').end()[0] == 0
    (tmp_path/'run'/'config.json').write_bytes(before['config.json'])
    for more, sentence in ((['--lr', 0.5], 'lr 0.008 (now 0.5)'),
                           (['--seed', 3], 'seed 0 (now 3)')):
        status, _, err = Child(tmp_path, *here, '--data', photos, *more).end()
        assert status == 2 and sentence in err and err.count('\n') == 1, err
        assert err.index('to go on') < err.index('--out') < err.index('--overwrite')  # last
    image = tmp_path/'copy'/'photos'/'00.jpg'
    for change in (lambda: image.rename(image.with_name('other.jpg')),
                   image.with_name('other.jpg').unlink):
        change()
        status, _, err = Child(tmp_path, *here, '--data', image.parent).end()
        assert status == 2 and 'images changed' in err and err.count('\n') == 1, err
    assert files_of(tmp_path/'run') == before


def test_a_recipe_brings_vit_settings_to_vits_only(photos, tmp_path):
    words = ['--data', photos, '--backbone', 'resnet18', '--epochs', 4, '--batch-size', 8,
             '--device', 'cpu']
    for more, works in ([], True), (['--depth', 2], False), (['--recipe', 'cifar10'], True):
        child = Child(tmp_path, *words, *more, settings=[],
                      train=lambda *args: print('it would train'))
        status, out, err = child.end()
        if works: assert status == 0 and 'it would train' in out and not err, err
        else: assert status == 2 and 'depth does not apply to resnet18' in err, err


def test_a_disk_too_full_for_the_last_checkpoint(photos, small_disk, tmp_path):
    "Status 1 and no summary, though figures would fit; what is said is what is on the disk"
    folder = small_disk.path/'run'
    words = ['--data', photos, '--out', folder]
    wide = ['--hidden-dim', 512, '--epochs', 12]
    child = Child(tmp_path, *words, *wide, figures=report.figures)
    child.reach(folder/'log.jsonl', '"step": 4')
    small_disk.fill(leave=2**19)
    status, out, err = child.end()
    step = load_checkpoint(folder/'checkpoint.pt')['step']
    assert 0 < step < 60 and (folder/'checkpoint.pt').stat().st_size > 2**20
    assert status == 1 and 'No space left on device' in err and err.count('\n') == 1, err
    assert f'at step 60 of 60; the same command goes on from step {step}' in err, err
    assert 'weights are in' not in out and not (folder/'summary.json').exists()
    small_disk.empty()
    status, out, err = Child(tmp_path, *words, *wide).end()
    assert status == 0 and f'going on at step {step}' in out and 'weights are in' in out, err
    steps = [json.loads(line)['step'] for line in (folder/'log.jsonl').read_text().splitlines()]
    assert steps == list(range(2, 61, 2))


def test_a_disk_too_full_when_it_is_asked_to_stop(photos, small_disk, tmp_path):
    folder = small_disk.path/'run'
    child = Child(tmp_path, '--data', photos, '--out', folder, *LONG)
    child.reach(folder/'checkpoint_last_good.pt')
    small_disk.fill()
    child.reach(child.files[0], 'could not be written')
    child.kill(signal.SIGTERM)
    status, out, err = child.end()
    step = load_checkpoint(folder/'checkpoint.pt')['step']
    assert status == 1 and f'the same command goes on from step {step}.' in err, err
    assert 'goes on from here' not in out


def test_a_folder_that_is_deleted_ends_the_run(photos, tmp_path):
    child = Child(tmp_path, '--data', photos, '--out', 'run', *LONG)
    child.reach(tmp_path/'run'/'log.jsonl', '"step": 4')
    (tmp_path/'run').rename(tmp_path/'gone'); shutil.rmtree(tmp_path/'gone')
    status, _, err = child.end(20)
    assert status == 1 and 'run was deleted or replaced' in err and err.count('\n') == 1, err
    assert not (tmp_path/'run').exists()


def test_a_figure_that_fails_is_a_note(photos, tmp_path):
    def broken(*args): raise RuntimeError('no screen')
    words = '--data', photos, '--out', 'run'
    status, out, err = Child(tmp_path, *words, figures=report.figures, plot_curves=broken).end()
    assert status == 0 and not err and 'note: curves.png could not be made' in out, out + err
    assert {'summary.json', 'views.png', 'attention.png'} <= files_of(tmp_path/'run').keys()


def test_home_and_odd_names(photos, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    short = ['--data', photos, '--epochs', 0.6]
    status, _, err = Child(tmp_path, *short, '--out', '~/run').end()
    assert status == 0 and (tmp_path/'home'/'run'/'summary.json').exists(), err
    odd = 'a\x1b[31mb\nc\x07'
    for _ in range(2):                                   # trained, and found finished
        status, out, err = Child(tmp_path, *short, '--out', odd).end()
        assert status == 0 and (tmp_path/odd/'summary.json').exists(), err
        assert all(c.isprintable() or c == '\n' for c in out) and '\\x1b[31m' in out, repr(out)
    status, out, err = Child(tmp_path, *short, '--out', odd, '--lr', 1).end()
    assert status == 2 and err.count('\n') == 1 and '\x1b' not in err, repr(err)


VALUES = [None, True, -1, 0, 10**400, 2.5, 1e308, 'text', '\x00', [], {}, [[1]], {'a': 1}]


def damaged_bytes(data, chance):
    "Bytes cut short, flipped, or replaced by something else"
    kind = chance.randrange(6)
    if kind == 0: return data[:chance.randrange(len(data))]
    if kind == 1:
        i = chance.randrange(len(data))
        return data[:i] + bytes([data[i] ^ 1 << chance.randrange(8)]) + data[i + 1:]
    return [b'', b'[' * 10**5, b'\xff\xfe\x00\xd8', b'null'][kind - 2]


def damaged_value(value, chance):
    "A dict in which one value, or one key, is another one"
    value, name = json.loads(json.dumps(value)), chance.choice([*value])
    if chance.random() < 0.3: del value[name]
    elif isinstance(value[name], dict) and value[name] and chance.random() < 0.5:
        value[name] = damaged_value(value[name], chance)
    else: value[name] = chance.choice(VALUES)
    return value


def damage_text(path, chance):
    lines = path.read_bytes().splitlines() if path.suffix == '.jsonl' else [path.read_bytes()]
    i = chance.randrange(len(lines))
    if chance.random() < 0.4: lines[i] = damaged_bytes(lines[i], chance)
    else: lines[i] = json.dumps(damaged_value(json.loads(lines[i]), chance)).encode()
    path.write_bytes(b'\n'.join(lines) + b'\n')


def damage_checkpoint(path, chance):
    "Another shape, type or value at a random place; or another file"
    if chance.random() < 0.2: return path.write_bytes(damaged_bytes(path.read_bytes(), chance))
    state, places = torch.load(path, weights_only=True), []
    map_state(lambda where, leaf: places.append(where), state)
    heads = sorted({where.split(']')[0] for where in places})
    head = chance.choice(heads)                          # a part, then a place in it
    place = chance.choice([where for where in places if where.startswith(head)])
    wrong = [*VALUES, torch.ones(3), torch.ones(()), torch.ones(2, 2).double(), torch.ones(2).int()]

    def change(where, leaf):
        if where != place: return leaf
        if isinstance(leaf, torch.Tensor) and leaf.ndim and chance.random() < 0.5: return leaf[:-1]
        return chance.choice(wrong)

    if chance.random() < 0.15: del state[head.split("'")[1]]
    else: state = map_state(change, state)
    torch.save(state, path)


def replace_by(path, kind):
    path.unlink()
    if kind == 'fifo': os.mkfifo(path)
    elif kind == 'folder': path.mkdir()
    elif kind == 'loop': path.symlink_to(path)


def fuzz(photos, finished, place, cases):
    "Damage a copy of a run, take it up; one line to the parent for each: it ends in a sentence"
    for seed, name, kind in cases:
        folder, chance = place/f'{seed}', random.Random(seed)
        shutil.copytree(finished, folder)
        if name != 'summary.json': (folder/'summary.json').unlink()
        if kind != 'damage': replace_by(folder/name, kind)
        elif name == 'checkpoint.pt': damage_checkpoint(folder/name, chance)
        else: damage_text(folder/name, chance)
        kept = name == 'checkpoint.pt' and seed % 2
        if name == 'checkpoint.pt' and not kept: (folder/'checkpoint_last_good.pt').unlink()
        words = '--data', photos, '--out', folder
        status, out, err = Child(place, *words).end()
        story = f'seed {seed}, {name}, {kind}: status {status}\n{out}{err}'
        assert status in (0, 1, 2) and err.count('\n') == bool(status), story
        if status: assert len(err) < 700 and not (folder/'log_damaged.jsonl').exists(), story
        else:
            assert json.loads((folder/'summary.json').read_text())['steps'] == 10, story
            assert load_checkpoint(folder/'checkpoint.pt')['step'] == 10, story
        if kept: assert status == 0, story               # the one before it was good
        if name == 'log.jsonl' and kind == 'damage': assert status == 0, story
        shutil.rmtree(folder)


DAMAGED = 'config.json', 'log.jsonl', 'summary.json', 'checkpoint.pt'


@pytest.mark.parametrize('name', DAMAGED)
def test_damaged_files_end_in_a_sentence(photos, finished, tmp_path, name):
    n = 24 if name == 'checkpoint.pt' else 12
    cases = [(1000 * DAMAGED.index(name) + i, name, 'damage') for i in range(n)]
    cases += [(cases[-1][0] + 1 + i, name, kind)
              for i, kind in enumerate(('fifo', 'folder', 'loop'))]
    fuzz(photos, finished, tmp_path, cases)
