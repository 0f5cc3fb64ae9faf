"""Hundreds of wrong command lines: each ends with status 2 and one short sentence that names what
is wrong, and changes nothing. FUZZ_SEED=7 draws others; a failure prints the words to repeat it."""
import os
import random
import socket
import tarfile
from dataclasses import fields

import pytest
from processes import call_many

from dino_nb.settings import CHOICES, RANGES, TrainConfig

SEED = int(os.environ.get('FUZZ_SEED', 0))
LONGEST = 300  # letters of a sentence
KINDS = {field.name: field.type for field in fields(TrainConfig)}
NUMBERS = [name for name, kind in KINDS.items() if kind in (int, float, int | None)]
TUPLES = [name for name, kind in KINDS.items() if 'tuple' in str(kind)]
SWITCHES = [name for name, kind in KINDS.items() if kind in (bool, bool | None)]
ODD = ['', ' ', '-', 'ٱ', 'a\nb', '\x1b[2J', '\udcff', 'x' * 10_000, '0x10', '1,5', '1e', 'None',
       '[]']


def flag(name): return '--' + name.replace('_', '-')


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    "A folder with things that are neither images nor runs"
    top = tmp_path_factory.mktemp('odd')
    for name in ('empty', 'taken', 'lies', 'folders/a.jpg'): (top/name).mkdir(parents=True)
    (top/'taken'/'thesis.tex').write_text('mine')
    (top/'lies'/'a.jpg').write_text('no image')
    for name, text in (('note.txt', ''), ('page.pdf', 'no image'), ('nul.txt', '\0' * 100),
                       ('lost.txt', 'gone.jpg\n'), ('zip.tar', 'PK\3\4'),
                       ('array.npy', '\x93NUMPY'), ('long.txt', 'y' * 10_000 + '.jpg\n')):
        (top/name).write_text(text)
    (top/'wrong.txt').write_bytes(b'\xff\xfe\xfd\n')
    with tarfile.open(top/'hollow.tar', 'w'): pass
    (top/'loop').symlink_to('loop'); (top/'dangling').symlink_to('nowhere')
    os.mkfifo(top/'pipe')
    with socket.socket(socket.AF_UNIX) as server: server.bind(str(top/'socket'))
    return top


def faults(words, names, answer):
    "What is wrong with the answer to wrong words, of which one of the names should be in it"
    (status, out, err), found = answer, []
    lines = err.splitlines()
    if status != 2: found.append(f'status {status}')
    if len(lines) != 1 or not err.startswith('dino_train: '): found.append('not one sentence')
    if max(map(len, lines), default=0) > LONGEST: found.append(f'{len(err)} letters')
    if not any(name in err for name in names): found.append(f'names none of {names}')
    if 'Traceback' in err or not err.isascii() and not err.strip().isprintable():
        found.append('not printable')
    if not found: return []
    said = err if len(err) < 1500 else f'{err[:500]} ... {err[-900:]}'
    shown = ' '.join(repr(word) if len(word) < 200 else f'{word[:9]!r} * {len(word)}'
                     for word in words)
    return [f'{shown}\n    {"; ".join(found)}: {said}']


def check(cases, cwd):
    "Each answer, and that nothing was written"
    cases, wrong = [([*map(str, words)], names) for words, names in cases], []
    files = lambda: sorted((path, path.lstat().st_mtime_ns) for path in cwd.rglob('*'))
    for part in (cases[i:i + 20] for i in range(0, len(cases), 20)):
        before, many = files(), [words for words, _ in part]
        for case, answer in zip(part, call_many(many, cwd)): wrong += faults(*case, answer)
        if files() != before: wrong.append(f'something was written by one of {many}'[:9999])
    assert not wrong, f'{len(wrong)} of {len(cases)}, FUZZ_SEED={SEED}:\n' + '\n'.join(wrong)


def numbers_out_of_range(draw):
    for name in NUMBERS:
        low, high = RANGES.get(name, (0, 1))
        step = 1 if KINDS[name] in (int, int | None) else 1e-3 * max(abs(high), 1e-3)
        wrong = [low - step, high + step, high * 1000 + 1, -(10**6), 'nan', '1e999', '-inf', 'inf',
                 '9' * 5000, '1.5e', *ODD]
        if KINDS[name] != float: wrong.append('1.5')
        yield from ((['--data', 'nowhere', flag(name), str(value)], [name, flag(name)])
                    for value in draw.sample(wrong, 4))
        yield [flag(name)], [flag(name)]
        yield ['--data', 'nowhere', flag(name), '1', '17'], ['17', name]


def tuples_that_are_none(draw):
    for name in TUPLES:
        wrong = ['', '-1 -1', '0 0', '1e9 1e9', 'nan nan', '1 2 3 4', 'a b', '9 ' * 5000,
                 '1e999 1e999']
        for value in draw.sample(wrong, 4):
            yield ['--data', 'nowhere', flag(name), *value.split()], [name, flag(name)]


def choices_that_are_none(draw):
    for name in CHOICES:
        first = CHOICES[name][0]
        for value in draw.sample([*ODD, 'Cneter', first.upper(), first + 'x'], 3):
            yield ['--data', 'nowhere', flag(name), value], [name, flag(name)]
    for name in ('recipe', 'backbone'):
        for value in [*draw.sample(ODD, 5), 'vit_smal_patch16_224', 'tinny', 'hf-hub:a/b']:
            yield ['--recipe', 'tiny', '--data', 'shapes', flag(name), value], [name]


def flags_that_are_none(draw):
    for name in SWITCHES:
        yield ['--data', 'nowhere', f'{flag(name)}=yes'], [flag(name)]
        yield ['--data', 'nowhere', flag(name), 'yes'], ['yes']
    for name in draw.sample([*KINDS], 30):
        word = flag(name)
        i = draw.randrange(2, len(word) - 1)
        for wrong in (word[:i] + word[i + 1:], word[:i] + word[i + 1] + word[i] + word[i + 2:]):
            if wrong != word: yield ['--data', 'nowhere', wrong, '1'], [wrong]
    for word in ('-x', '---', '--', '--é', '--a\nb', '--' + 'x' * 10_000, '--\udcff', 'photos',
                 '@photos', 'a b', '', '--=', '--lr=', '-1', '--data=nowhere --lr=1'):
        yield ['--data', 'nowhere', word], ['setting', 'lr', 'data']
    yield ['photos'] * 5000, ['photos']


PAIRS = ['--recipe tiny --epochs 1', '--recipe tiny --epochs 3 --freeze-last-layer 4',
         '--recipe tiny --warmup-epochs 30', '--recipe tiny --warmup-teacher-temp-epochs 30',
         '--recipe tiny --fsdp --optimizer sgd', '--recipe tiny --fsdp --optimizer lars']


def test_settings_by_themselves(odd):
    draw, cases = random.Random(SEED), []
    for kind in (numbers_out_of_range, tuples_that_are_none, choices_that_are_none,
                 flags_that_are_none): cases += kind(draw)
    cases += [(['--data', 'nowhere', *words.split()], ['epochs', 'fsdp']) for words in PAIRS]
    check(cases, odd)


def test_images_that_are_none(odd):
    "Whatever --data names that is no set of images, by any spelling"
    draw, inside = random.Random(SEED), ['a.jpg', '0.tar', 'photos does not exist']
    wrong = ['', ' ', 'nowhere', 'nowhere/', 'empty', 'note.txt', 'page.pdf', 'nul.txt',
             'wrong.txt', 'lost.txt', 'long.txt', 'zip.tar', 'array.npy', 'hollow.tar', 'lies',
             'folders', 'loop', 'dangling', 'pipe', 'socket', '/dev/null', '/dev/zero',
             'x' * 300, 'x/' * 3000,
             'a\nb', '\x1b[2J', 'é', '\udcff', '~nobody/photos', 'gone.tar', '{0..3}.tar',
             '{0..999999999999}.tar', '{0..9}' * 9 + '.tar', '{.tar', 'http://a.b/c.tar',
             's3://a/b.tar', 'pipe:cat a.tar', 'a.tgz', 'lies/a.jpg', 'note.txt/photos', '-1']
    cases = [([*recipe, '--data=' + word], ['data', word.strip().strip('/')[:8] or 'data', *inside])
             for recipe, words in (([], wrong), (['--recipe', 'tiny'], draw.sample(wrong, 9)))
             for word in words]
    for _, names in cases:  # a name that a terminal would obey is escaped
        if not names[1].isprintable(): names[1] = names[1].encode('unicode_escape').decode()
    check(cases, odd)


def test_folders_that_cannot_be_written(odd, images, tmp_path):
    "Whatever --out names that is no place for a run; what is left is refused for its loss"
    for name in ('note.txt', 'taken', 'loop', 'dangling'):
        (tmp_path/name).symlink_to(odd/name) if name != 'loop' else (tmp_path/name).symlink_to(name)
    wrong = ['note.txt', 'note.txt/run', 'taken', 'taken/thesis.tex/run', 'loop', 'loop/run',
             'x' * 300, 'x/' * 3000, '/dev/null', '/dev/null/run', 'dangling']
    free = ['new', 'a\nb', 'é', '\udcff', '/proc/run']  # could be made, or fail to be: later
    start = ['--data', images, '--recipe', 'tiny', '--loss', 'mse', '--target', 'sinkhorn']
    cases = [([f'--out={word}'], ['out', word[:8]]) for word in wrong]
    cases += [([f'--out={word}', '--overwrite'], ['out', word]) for word in wrong[:5]]
    cases += [([f'--out={word}'], ['mse']) for word in free]
    check([([*start, *words], names) for words, names in cases], tmp_path)


LATE = ['--embed-dim 97 --num-heads 3', '--batch-size 10000', '--batch-size 15 --accumulate 4',
        '--accumulate 1000000', '--out-dim 100000000 --bottleneck-dim 100000',
        '--global-size 50 --depth 1',
        '--embed-dim 100000 --num-heads 1 --depth 256', '--head-layers 100 --hidden-dim 100000',
        '--global-size 10000 --local-size 10000 --n-local 1000', '--loss mse --target sinkhorn',
        '--target sinkhorn --batch-size 1', '--use-bn --batch-size 1', '--head-layers 0',
        '--backbone resnet18 --patch-size 8', '--global-size 8 --patch-size 16',
        '--patch-size 7', '--predictor 100000 --out-dim 100000000', '--num-heads 97']


def test_settings_that_do_not_go_together(images, tmp_path):
    "Settings that only images, network or memory can refuse: before anything is written"
    check([([*recipe, '--data', images, '--device', 'cpu', *words.split()],
            [word[2:].replace('-', '_') for word in words.split() if word.startswith('--')]
            + ['img_size', 'patch']) for recipe in ([], ['--recipe', 'tiny']) for words in LATE],
          tmp_path)
