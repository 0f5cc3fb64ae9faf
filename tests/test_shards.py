"Training from WebDataset shards as a user starts it: the same run as from single files."
import io
import json
import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import carried, same_weights
from torchvision.transforms.functional import to_pil_image
from webdataset import ShardWriter

from dino_nb import train
from dino_nb.data import open_images
from dino_nb.dist import StepSampler, World
from dino_nb.settings import make_config
from dino_nb.shapes import Shapes
from dino_nb.shards import epoch_order, open_shards
from dino_nb.views import file_views

SMALL = ('--depth 1 --embed-dim 48 --num-heads 2 --batch-size 16 --epochs 2 --warmup-epochs 1 '
         '--freeze-last-layer 1 --log-every 3 --knn-every 0 --workers 0 --device cpu '
         '--precision float64').split()


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "100 JPEGs in 20 shards of five, with labels; the same as single files"
    folder, shapes = tmp_path_factory.mktemp('data'), Shapes(100, size=40)
    for name in ('shards', 'files'): (folder/name).mkdir()
    with ShardWriter(str(folder/'shards'/'%03d.tar'), maxcount=5, verbose=0) as shards:
        for i, (image, label) in enumerate(zip(shapes.images, shapes.labels % 2)):
            to_pil_image(image).save(file := io.BytesIO(), 'jpeg')
            jpeg = file.getvalue()
            shards.write({'__key__': f'{i:03}', 'jpg': jpeg, 'cls': int(label)})
            (folder/'files'/str(int(label))).mkdir(exist_ok=True)
            (folder/'files'/str(int(label))/f'{i:03}.jpg').write_bytes(jpeg)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))


def sampler(source, rank=0, size=1, **kwargs):
    order = partial(epoch_order, source, 0)
    return StepSampler(len(source), 16, 0, World(rank, size), epochs=2, order=order, **kwargs)


def test_ranks_and_resume_keep_the_batches(data):
    source = open_shards(data/'shards'/'{000..019}.tar')
    whole = list(sampler(source))
    parts = [list(sampler(source, rank, 2)) for rank in range(2)]
    assert whole == [a + b for a, b in zip(*parts)]
    assert whole[8:] == list(sampler(source, start_step=8))     # in the middle of the second epoch
    first = [source.name(i) for batch in whole[:6] for _, i in batch]
    assert len(set(first)) == 96
    assert len({name.split('/')[0] for name in first[:80]}) == 16  # of 20, 16 shards at a time


def test_workers_change_nothing(data):
    settings = make_config('tiny', epochs=2, batch_size=16)
    source, views = open_shards(data/'shards'/'*.tar'), []
    for workers in (0, 2):
        stream = file_views(source, sampler(source, start_step=9), settings, 0,
                            torch.device('cpu'), workers)
        views.append([(group, bad) for batch, bad in stream for group in batch])
    assert len(views[0]) == 3 * 2
    for (a, bad_a), (b, bad_b) in zip(*views): assert torch.equal(a, b) and bad_a == bad_b


def test_two_processes_train_as_one(data, job, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ['--data', str(data/'shards'/'{000..019}.tar')] + SMALL
    train.main(words + ['--out', 'one'])
    assert '20-NN accuracy  teacher' in capsys.readouterr().out  # the shards have labels
    status, out, err = job.run(words + ['--out', 'two'], tmp_path, ranks=2,
                               XDG_CACHE_HOME=str(tmp_path/'cache'))
    assert status == [0, 0] and '2 process(es)' in out, err
    same_weights(tmp_path/'one', tmp_path/'two', 'student', atol=carried(steps=12))


def test_shards_train_as_files_do(data, tmp_path):
    "No more than 16 shards are mixed as a whole: the order, and so the run, is that of the files"
    flat, names = tmp_path/'flat', []
    flat.mkdir()
    for path in sorted((data/'files').rglob('*.jpg')):
        if int(path.stem) < 75: (flat/path.name).write_bytes(path.read_bytes())
    for out, source in (('shards', data/'shards'/'{000..014}.tar'), ('files', flat)):
        config = make_config(epochs=1, warmup_epochs=0, freeze_last_layer=0, batch_size=16, depth=1,
                             out=str(tmp_path/out), workers=0, precision='float32', device='cpu')
        images = open_shards(source) if out == 'shards' else open_images(source)
        names.append([Path(images.name(i)).name for i in epoch_order(images, 0, 0).tolist()])
        learner = train.Learner(config, images)
        learner.fit(report=lambda line: None)
        names.append([value.clone() for value in learner.teacher.state_dict().values()])
    assert names[0] == names[2] and all(map(torch.equal, names[1], names[3]))


def test_resume_in_the_middle_of_an_epoch(data):
    source, quiet = open_shards(data/'shards'/'*.tar'), lambda line: None
    config = make_config(epochs=2, warmup_epochs=1, freeze_last_layer=0, batch_size=16, depth=1,
                         workers=0, precision='float32', device='cpu', knn_every=0, log_every=1)
    whole, first, second = (train.Learner(config, source) for _ in range(3))
    rows = whole.fit(report=quiet)
    first.n_steps = first.sampler.n_steps = 8       # stops after 8 of 12 steps
    first.fit(report=quiet)
    second.load_state(first.state())
    again = second.fit(report=quiet)
    assert [row['loss'] for row in rows[8:]] == [row['loss'] for row in again]
    with pytest.raises(ValueError, match='images changed'):
        train.Learner(config, open_shards(data/'shards'/'{000..018}.tar')).load_state(first.state())


BAD = [('missing/{000..003}.tar', '4 of 4 shards cannot be used'),
       ('cut.tar', 'cut.tar (unexpected end'),
       ('photo.tar', 'photo.tar ('), ('words.tar', 'no member is named like'),
       ('*_.tar', 'No such'),
       ('shards.tar.gz', 'unpack'), ('https://some.where/{0..9}.tar', 'stream'),
       ('pipe:cat a.tar', 'stream'), ('{000..099.tar', 'braces'),
       ('spoiled.tar', '10 of 10 images')]


@pytest.mark.parametrize('pattern,sentence', BAD, ids=[pattern for pattern, _ in BAD])
def test_bad_shards_are_one_sentence(data, tmp_path, monkeypatch, capsys, pattern, sentence):
    monkeypatch.chdir(tmp_path)
    whole = (data/'shards'/'000.tar').read_bytes()
    Path('cut.tar').write_bytes(whole[:5000]); Path('photo.tar').write_bytes(b'\xff\xd8' * 999)
    Path('note.txt').write_text('words')
    with tarfile.open('words.tar', 'w') as tar: tar.add('note.txt')
    with tarfile.open('spoiled.tar', 'w') as tar:
        for i in range(10): tar.add('note.txt', f'{i}.jpg')
    with pytest.raises(SystemExit) as stop: train.main(['--data', pattern, '--out', 'run'] + SMALL)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in err and len(err.strip().splitlines()) == 1, err
    assert not Path('run').exists()


def test_a_bad_image_is_left_out_and_named(data, tmp_path, monkeypatch):
    jpeg = (data/'files'/'0'/'000.jpg').read_bytes()
    with ShardWriter(str(tmp_path/'%d.tar'), maxcount=200, verbose=0) as shards:
        for i in range(300): shards.write(dict(__key__=str(i), jpg=jpeg[:300 if i == 7 else None]))
    monkeypatch.chdir(tmp_path)
    train.main(['--data', '{0..1}.tar', '--out', 'run'] + SMALL)
    assert (tmp_path/'run'/'bad_files.txt').read_text().startswith('0.tar/7.jpg\t')
    assert json.loads((tmp_path/'run'/'summary.json').read_text())['bad_files'] == 1
