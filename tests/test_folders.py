"What is taken from a folder, a list or a tar, and what is said about it."
import io
import json
import os
import pty
import shutil
import stat
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from processes import SMALL

from dino_nb import run, train
from dino_nb.core import progress
from dino_nb.data import check_images, find_splits, open_images
from dino_nb.decode import TooManyBadFiles
from dino_nb.dist import World
from dino_nb.knn import pixel_knn
from dino_nb.settings import make_config
from dino_nb.shapes import Shapes
from dino_nb.shards import open_shards


def picture(path, seed=0):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (12, 12, 3), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.numpy()).save(path, 'PNG')


def folders(root, *names, n=3):
    for name in names:
        for i in range(n): picture(root/name/f'{i}.jpg', seed=i)
    return root


def opened(root):
    source, _ = find_splits(root)
    return len(source), source.classes, ' | '.join(source.notes)


def forked(*functions):
    "What functions return, each called in a process of its own"
    ends = []
    for function in functions:
        read, write = os.pipe()
        if os.fork() == 0:
            try: os.write(write, json.dumps(function()).encode())
            finally: os._exit(0)
        os.close(write); ends.append(read)
    return [json.loads(open(end).read()) for end in ends]


# ---------------------------------------------------------------- folders
NAMES = ['plain.jpg', 'with space.jpg', 'tab\there.jpg', 'line\nbreak.jpg', 'Ma\u0308rz.jpg',
         '写.jpg', '-rf.jpg', "quote'\".jpg", 'UPPER.JPG', 'sep\u2028arator.jpg', 'next\x85line.jpg',
         'back\\slash.jpg', 'a.b.jpg', ' leading.jpg', 'trailing .jpg', '[x].jpg', '#hash.jpg',
         'no\udce4text.jpg', 'comma, blank 3.jpg', 'two.jpg 1.jpg']


def test_any_name_is_opened_and_any_but_a_line_break_can_be_listed(tmp_path):
    for i, name in enumerate(NAMES): picture(tmp_path/'names'/name, seed=i)
    source = open_images(tmp_path/'names')
    assert {source.name(i) for i in range(len(source))} == set(NAMES)
    assert not check_images(source, limit=0)
    lines = [f'names/{name}' for name in NAMES if '\n' not in name]
    (tmp_path/'list.txt').write_text('\n'.join(lines), errors='surrogateescape')
    source = open_images(tmp_path/'list.txt')
    assert [source.name(i) for i in range(len(source))] == lines
    assert not check_images(source, limit=0)


def test_litter_is_no_image_and_no_class(tmp_path):
    root = folders(tmp_path, 'cat', 'dog', 'cat/@eaDir/0.jpg', 'dog/.thumbnails',
                   '.AppleDouble/cat', '__MACOSX/cat', 'Thumbs', '.git', '#recycle')
    for name in ('cat/._0.jpg', '.DS_Store', 'cat/Thumbs.db', 'cat/.0.jpg'): (root/name).touch()
    (root/'empty').mkdir()
    assert opened(root) == (6, ['cat', 'dog'], '2 classes by folder: cat, dog | left out: 1 .db; '
                            '12 images in #recycle, Thumbs, __MACOSX and 1 more, thumbnails or '
                            'files of a system; 1 folder without images (empty)')


def test_suffixes_that_are_left_out_are_counted(tmp_path):
    folders(tmp_path, '.', n=4)
    for i in range(6): (tmp_path/f'{i}.HEIC').touch()
    for name in ('notes.txt', 'all.zip', 'README'): (tmp_path/name).touch()
    count, _, notes = opened(tmp_path)
    assert count == 4 and notes.startswith('left out: 6 .heic, ')
    for kind in ('1 .txt', '1 .zip', '1 without a suffix'): assert kind in notes


SPLITS = [('Training', 'Testing'), ('train', 'Validation'), ('TRAIN', 'val'), ('trn', 'tst')]


@pytest.mark.parametrize('names', SPLITS, ids=map('+'.join, SPLITS))
def test_usual_names_of_splits(tmp_path, names):
    root = folders(tmp_path, *(f'{name}/{c}' for name in names for c in ('cat', 'dog')))
    source, test = find_splits(root)
    assert (len(source), len(test), source.classes, test.classes) == (6, 6, *[['cat', 'dog']] * 2)
    assert source.notes[0] == f'trained on {names[0]}, judged on {names[1]}'
    bank = run.open_data(make_config('tiny', data=str(root)))[1:]
    assert [len(part) for part in bank] == [6, 6]
    with pytest.raises(ValueError, match=f'holds {names[0]} and {names[1]} images'):
        open_images(root)


def test_what_lies_beside_splits_is_said(tmp_path):
    root = folders(tmp_path, 'Train/a', 'Train/b', 'Val/a', 'Val/b', 'Test/a', 'cat', '@eaDir')
    picture(root/'stray.jpg')
    source, test = find_splits(root)
    assert test.name(0).startswith('a') and (len(source), len(test)) == (6, 6)
    assert source.notes[:2] == ['trained on Train, judged on Val',
                                'left out beside them: Test, cat, stray.jpg']


def test_levels_and_strays(tmp_path):
    nested = folders(tmp_path/'nested', 'birds/one', 'birds/two', 'fish/one')
    assert opened(nested) == (9, ['birds', 'fish'], '2 classes by folder: birds, fish; the 3 '
                              'folders below them are not told apart')
    one = folders(tmp_path/'one', 'data/cat', 'data/dog')
    assert opened(one) == (6, None, 'no classes: all images lie in one folder, data; open that '
                           'folder itself to take its folders as classes')
    picture(nested/'stray.jpg')
    assert 'no classes, for images lie beside the folders: stray.jpg' in opened(nested)[2]
    assert opened(folders(tmp_path/'album', 'cat.jpg', 'dog'))[:2] == (6, ['cat.jpg', 'dog'])


def test_links(tmp_path):
    root = folders(tmp_path/'loop', 'cat', 'dog')
    (root/'cat'/'again').symlink_to(root); (root/'all').symlink_to('.')
    (root/'a_dog').symlink_to('dog'); (root/'itself').symlink_to('itself')
    assert opened(root)[:2] == (6, ['cat', 'dog'])         # each image once, by its own name
    for c in ('a', 'b'):
        (tmp_path/'farm'/c).mkdir(parents=True)
        for i in range(3): (tmp_path/'farm'/c/f'{i}.jpg').symlink_to(root/'cat'/f'{i}.jpg')
    assert opened(tmp_path/'farm')[:2] == (6, ['a', 'b'])
    for i in range(3): (root/'cat'/f'annex{i}.jpg').symlink_to(f'../.git/annex/{i}')
    source = open_images(root)
    assert len(source) == 9
    with pytest.raises(TooManyBadFiles, match='3 of 9 .*cat/annex0.jpg.*link that leads nowhere'):
        check_images(source)


def test_pipes_and_sockets_are_no_images(tmp_path):
    root = folders(tmp_path, 'cat', 'dog')
    os.mkfifo(root/'cat'/'live.jpg'); os.mkfifo(root/'config.json')
    assert opened(root)[:2] == (6, ['cat', 'dog'])


def test_a_folder_that_cannot_be_read(tmp_path):
    "Root may read everything, so another user looks"
    place = Path(tempfile.mkdtemp())
    try:
        place.chmod(0o755); folders(place, 'cat', 'dog', 'lost+found')
        for name in ('dog', 'lost+found'): (place/name).chmod(0)
        def look():
            if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)
            try: open_images(place)
            except ValueError as error: return str(error)
        assert 'dog cannot be listed: Permission denied' in forked(look)[0]
        (place/'dog').chmod(0o755)
        assert forked(lambda: (look(), len(open_images(place)))[1]) == [6]
    finally:
        for name in ('dog', 'lost+found'): (place/name).chmod(stat.S_IRWXU)
        shutil.rmtree(place)


NO_FOLDER = {'a.jpg': 'is a single image; name the folder', 'a.zip': 'unpack the archive',
             'a.npz': 'as a tensor, a list or a Dataset', 'a.parquet': 'as a tensor, a list',
             'a.pdf': 'neither a folder nor a list', 'a.txt': 'is no list of images', 'b': 'exist'}


@pytest.mark.parametrize('name', NO_FOLDER)
def test_what_is_no_folder_gets_one_sentence(tmp_path, name):
    if name != 'b': (tmp_path/name).write_text('words of any kind')
    with pytest.raises(ValueError, match=NO_FOLDER[name]): open_images(tmp_path/name)


def test_folders_that_hold_something_else(tmp_path):
    for name, words in {'x.parquet': 'as a tensor, a list or a Dataset', 'x.zip': 'unpack', 'x.tar':
                        'name tars as .*/[*].tar', '@eaDir': '3 images in @eaDir'}.items():
        root = tmp_path/name[1:]
        root.mkdir()
        if '.' in name: (root/name).touch()
        else: folders(root, name)
        with pytest.raises(ValueError, match=f'holds no images.*{words}'): open_images(root)


# ---------------------------------------------------------------- lists
@pytest.mark.parametrize('name,text,labels', [
    ('blank.txt', 'x/{0}.jpg 0\n', '01'), ('tab.txt', 'x/{0}.jpg\t{1}\n', 'ab'),
    ('comma.txt', 'x/{0}.jpg,{1}\n', 'ab'), ('windows.txt', 'x\\{0}.jpg\r\n', None),
    ('comments.txt', '# mine\nx/{0}.jpg\n', None), ('table.csv', 'x/{0}.jpg,{1}\n', 'ab'),
    ('utf16.txt', 'x/{0}.jpg;{1}\n', 'ab'), ('quotes.txt', '"x/{0}.jpg"\n', None)],
    ids=lambda value: value if isinstance(value, str) and '.' in value[:12] else '')
def test_lists(tmp_path, name, text, labels):
    folders(tmp_path, 'x', n=4)
    lines = [text.format(i, 'ab'[i % 2]) for i in range(4)]
    if name == 'blank.txt': lines = [f'x/{i}.jpg {i % 2}\n' for i in range(4)]
    if name == 'table.csv': lines.insert(0, 'file,label\n')
    (tmp_path/name).write_text(''.join(lines), encoding='utf-16' if 'utf16' in name else 'utf-8')
    source = open_images(tmp_path/name)
    assert len(source) == 4 and not check_images(source, limit=0)
    assert (source.labels is None) == (labels is None)
    if labels:
        assert source.labels.tolist() == [0, 1, 0, 1]
        assert source.notes == [f'2 classes by label: {labels[0]}, {labels[1]}']


def test_a_list_in_which_a_label_is_missing(tmp_path):
    folders(tmp_path, 'x', n=3)
    (tmp_path/'l.txt').write_text('x/0.jpg 1\nx/1.jpg 0\nx/2.jpg')
    assert opened(tmp_path/'l.txt') == (3, None, 'no classes: 1 of 3 labels are missing')
    (tmp_path/'l.txt').write_text('y/0.jpg 1\ny/1.jpg 0\n')
    with pytest.raises(ValueError, match='is no list of images: there is no file y/0.jpg'):
        open_images(tmp_path/'l.txt')


# ---------------------------------------------------------------- tars
def tar(path, members):
    picture(path.parent/'member')
    data = (path.parent/'member').read_bytes()
    with tarfile.open(path, 'w') as shard:
        for name, text in members:
            info, content = tarfile.TarInfo(name), data if text is None else text.encode()
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return open_shards(path)


def test_members_and_labels_of_tars(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    dotted = [f'PXL_{i}.jpg' for i in range(4)] + [f'PXL_{i}.PORTRAIT.jpg' for i in range(2)]
    dotted += [f'scan-{i}.2023.05.01.jpg' for i in range(2)] + ['x.heic', '@eaDir/1.jpg']
    for _ in range(2):                                             # the second time from the cache
        source = tar(tmp_path/'a.tar', [(name, None) for name in dotted])
        assert len(source) == 6
        assert source.notes == ['left out: 2 second images of a sample, 1 .heic']
    assert not check_images(source, limit=0)
    text = [(f'{i}.{kind}', word) for i in range(4)
            for kind, word in (('jpg', None), ('cls', ['dog', 'cat'][i % 2]))]
    source = tar(tmp_path/'b.tar', text)
    assert (source.labels.tolist(), source.classes) == ([1, 0, 1, 0], ['cat', 'dog'])
    source = tar(tmp_path/'c.tar', text[:-1])
    assert source.labels is None and source.notes == ['no classes: 1 of 4 labels are missing']
    source = tar(tmp_path/'d.tar', [(f'./{"ab"[i % 2]}/{i}.jpg', None) for i in range(4)])
    assert (source.labels.tolist(), source.notes) == ([0, 1, 0, 1], ['2 classes by folder: a, b'])
    source = tar(tmp_path/'e.tar', [(f'{name}/{i}.jpg', None) for i in (1, 2) for name in
                                    ('train', 'test')])
    assert source.labels is None and 'train, test are parts' in source.notes[0]


# ---------------------------------------------------------------- the script
def data_of(**settings): return run.open_data(make_config('tiny', **settings))


def test_a_fault_in_the_test_folder_leaves_training_alone(tmp_path):
    root = folders(tmp_path/'x', 'train/cat', 'train/dog', 'Test/cat', 'Test/bird')
    source, bank, test = data_of(data=str(root))
    assert (len(source), bank, test) == (6, None, None)
    assert source.notes[-1] == ('no k-NN: Test: The class bird is not among the 2 known ones: cat, '
                                'dog.')
    shutil.rmtree(root/'Test'/'bird')
    for i in range(2): (root/'Test'/'cat'/f'{i}.jpg').write_bytes(b'')
    assert data_of(data=str(root))[1] is None
    (root/'Test'/'cat'/'0.jpg').unlink()                            # one of two is let pass
    assert len(data_of(data=str(root))[2]) == 2
    shutil.rmtree(root/'Test'/'cat')
    source, bank, _ = data_of(data=str(root))
    assert bank is None
    assert 'no k-NN: Test: ' in source.notes[-1] and 'no images' in source.notes[-1]


def test_a_probe_that_cannot_serve_is_refused_and_a_damaged_one_is_said(tmp_path):
    root = folders(tmp_path, 'all', 'flat', 'probe/a', 'probe/b', n=9)
    with pytest.raises(ValueError, match='has no labels'): data_of(data=str(root/'all'),
                                                                   probe=str(root/'flat'))
    with pytest.raises(ValueError, match='does not exist'): data_of(data=str(root/'all'),
                                                                    probe=str(root/'none'))
    for i in range(4):
        source, bank, test = data_of(data=str(root/'all'), probe=str(root/'probe'))
        if i < 2: assert len(bank) + len(test) == 18 and 'probe: 2 classes' in source.notes[0]
        (root/'probe'/'a'/f'{i}.jpg').write_bytes(b'')
    assert bank is None and source.notes[-1].startswith('no k-NN: 3 of 18 images cannot be read')


def test_the_reason_why_there_is_no_knn(tmp_path):
    flat = folders(tmp_path/'flat', '.')
    assert 'no k-NN: The images have no labels; --probe' in data_of(data=str(flat))[0].notes[-1]
    single = folders(tmp_path/'single', *'abcd', n=1)
    assert 'no k-NN: 4 images in 4 classes are too few' in data_of(data=str(single))[0].notes[-1]


def test_the_embedded_images_and_a_folder_of_their_name(tmp_path, monkeypatch):
    folders(tmp_path, 'shapes/a', 'shapes/b')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, 'Shapes', lambda n=20, **kind: Shapes(min(n, 20), **kind))  # fewer
    assert data_of()[0].notes == ['shapes are the embedded images; the folder of that name is '
                                  './shapes']
    assert data_of(data='./shapes')[0].notes[0] == '2 classes by folder: a, b'


def test_a_run_among_the_images_is_not_read(tmp_path, monkeypatch, capsys):
    "cd photos; dino_train --data . once, and then with another seed"
    folders(tmp_path, 'a', 'b', n=10)
    (tmp_path/'a'/'1.heic').touch()
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        train.main(['--data', '.', '--out', f'runs/{seed}', '--seed', str(seed), *SMALL])
        out = capsys.readouterr().out
        assert 'note: 2 classes by folder: a, b\n' in out and '20-NN before training' in out
        assert ('note: left out: 1 .heic' + '; 1 folder of runs (runs/0)' * seed + '\n') in out
    assert progress.speaks is True
    assert json.loads(Path('runs/1/summary.json').read_text())['knn_teacher']


def test_damage_during_a_run_ends_knn_and_not_the_run(tmp_path, monkeypatch, capsys):
    root = folders(tmp_path/'x', 'train/a', 'train/b', 'test/a', 'test/b', n=16)
    monkeypatch.chdir(tmp_path)
    report = train.Learner.fit
    def fit(run, *args, **kwargs):
        for path in (root/'test').rglob('*.jpg'): path.write_bytes(b'')
        return report(run, *args, **kwargs)
    monkeypatch.setattr(train.Learner, 'fit', fit)
    train.main(['--data', str(root), '--out', 'run', *SMALL])
    out = capsys.readouterr().out
    assert '20-NN before training' in out and 'note: no k-NN: 4 of 32 images cannot be read' in out
    assert 'knn_teacher' not in json.loads(Path('run/summary.json').read_text())


def test_too_many_bad_files_are_the_same_error_in_all_processes(tmp_path):
    "No process waits for one that gave up; all the bad files are in the share of the second"
    source = open_images(folders(tmp_path/'x', 'a', 'b', n=8))
    for i in range(1, 12, 2): (tmp_path/'x'/source.name(i)).write_bytes(b'')
    def look(rank):
        dist.init_process_group('gloo', f'file://{tmp_path}/meet', rank=rank, world_size=2)
        try: return pixel_knn(source, source, (1,), world=World(rank, 2))
        except TooManyBadFiles as error: return str(error)
    answers = forked(*(lambda rank=rank: look(rank) for rank in range(2)))
    assert answers[0] == answers[1] and '4 of 16 images cannot be read' in answers[0]


def test_progress_in_a_terminal_and_in_a_log(tmp_path):
    def work(speaks=None):
        progress.speaks = speaks
        for _ in progress(range(30), 30, 'reading', wait=0.2): time.sleep(0.03)
    child, terminal = pty.fork()
    if child == 0:
        try: sys.stdout = open(1, 'w'); work()
        finally: os._exit(0)
    said = b''
    try:
        while more := os.read(terminal, 1000): said += more
    except OSError: pass                                           # it is over
    os.waitpid(child, 0)
    assert b'reading ...' in said and b' of 30, ' in said and b's left' in said
    assert b'\n' not in said and said.rsplit(b'\r', 2)[-2].strip() == b''   # and wiped out
    def in_log(speaks):
        with open(tmp_path/'log', 'w') as log:
            os.dup2(log.fileno(), 1); sys.stdout = log
            work(speaks)
        return (tmp_path/'log').read_text().splitlines()
    lines, quiet = forked(lambda: in_log(True))[0], forked(lambda: in_log(None))[0]
    assert 1 <= len(lines) <= 4 and lines[0].startswith('reading: ') and quiet == []
