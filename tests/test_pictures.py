"Pictures as people have them: what is opened, what it looks like, and what is said about the rest."
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tarfile
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dino_nb.augment import ViewSettings, crop_views, sample_views
from dino_nb.data import ImageSource, open_images
from dino_nb.decode import IMAGE_EXTENSIONS, BadImage, decode_image
from dino_nb.features import extract_features, raw_pixel_features
from dino_nb.shapes import Shapes
from dino_nb.shards import BadShard, open_shards
from dino_nb.train import main
from dino_nb.views import MultiCrop, file_views
from processes import SMALL

EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n'


def reason(path):
    with pytest.raises(BadImage) as error: decode_image(path)
    return error.value.reason


def test_a_picture_starts_no_program(tmp_path, monkeypatch):
    for name in ('gs', 'gswin64c'):                  # as PIL would find it, if it looked for it
        (tmp_path/name).write_text(f'#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n')
        (tmp_path/name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    (tmp_path/'photo.jpg').write_bytes(EPS)
    script = f'from PIL import Image; Image.open({str(tmp_path/"photo.jpg")!r}).load()'
    subprocess.run([sys.executable, '-c', script], capture_output=True)
    assert (tmp_path/'started').exists()             # PIL alone does start it
    (tmp_path/'started').unlink()
    assert 'format' in reason(tmp_path/'photo.jpg')
    with tarfile.open(tmp_path/'a.tar', 'w') as tar: tar.add(tmp_path/'photo.jpg', '1.jpg')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    with pytest.raises(BadImage, match='format'): open_shards(tmp_path/'a.tar')[0]
    assert not (tmp_path/'started').exists()


def test_what_is_no_file_is_not_read(tmp_path, monkeypatch):
    "Nobody writes into these: to open one is to wait for ever"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    for name in ('x.jpg', 'list.txt', 'a.tar'): os.mkfifo(tmp_path/name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path/'s.jpg'))
        assert reason(tmp_path/'s.jpg') == 'Is a socket, not a file'
    assert reason(tmp_path/'x.jpg') == 'Is a pipe, not a file'
    assert reason('/dev/zero') == 'Is a device, not a file'
    with pytest.raises((ValueError, OSError), match='pipe'): open_images(tmp_path/'list.txt')
    with pytest.raises(BadShard, match='Is a pipe, not a file'): open_shards(tmp_path/'a.tar')


@pytest.mark.parametrize('suffix', IMAGE_EXTENSIONS)
def test_every_listed_suffix_can_be_read(tmp_path, suffix):
    kind = {'.mpo': 'JPEG', '.pbm': 'PPM'}.get(suffix, Image.registered_extensions().get(suffix))
    if kind not in Image.SAVE: pytest.skip(f'this PIL reads {kind} but cannot write it')
    Image.new('RGB', (32, 32), (200, 100, 50)).save(tmp_path/f'a{suffix}', kind)
    source = open_images(tmp_path)
    assert len(source) == 1 and source[0].shape == (3, 32, 32)
    assert (source[0][:, 16, 16] - torch.tensor([200, 100, 50])).abs().max() < 9


def scene(height=48, width=64):
    "Four quadrants: red, green, blue, white"
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:height // 2, :width // 2] = 220, 30, 30
    picture[:height // 2, width // 2:] = 30, 200, 40
    picture[height // 2:, :width // 2] = 40, 50, 210
    picture[height // 2:, width // 2:] = 240, 240, 240
    return picture


def exif(*entries, more=b''):
    "An EXIF segment with these tags: (number, type, count, four bytes)"
    tags = b''.join(struct.pack('<HHI', *entry[:3]) + entry[3] for entry in entries)
    return (b'Exif\0\0II*\0' + struct.pack('<IH', 8, len(entries)) + tags + bytes(4) + more)


ORIENTATION = [(0x0112, 3, 1, struct.pack('<HH', held, 0)) for held in range(9)]
NONSENSE = {
    'width is text': (0x0100, 2, 5, struct.pack('<I', 62)),
    'maker is a number': (0x010F, 4, 1, struct.pack('<I', 7)),
    'resolution is a short': (0x011A, 3, 1, struct.pack('<HH', 72, 0)),
    'a rational far away': (0x011A, 5, 1, struct.pack('<I', 10**9)),
    'a type that is none': (0x0131, 99, 1, bytes(4)),
    'a table far away': (0x8769, 4, 1, struct.pack('<I', 10**9)),
    'a table that is itself': (0x8769, 4, 1, struct.pack('<I', 8)),
    'a count beyond all': (0x0132, 2, 2**31, struct.pack('<I', 8))}


def saved(path, tags, **how):
    "A JPEG with these bytes as its EXIF segment, right or wrong"
    out = io.BytesIO(); Image.fromarray(scene()).save(out, 'JPEG', quality=95, subsampling=0, **how)
    raw = out.getvalue()
    path.write_bytes(raw[:2] + b'\xff\xe1' + struct.pack('>H', len(tags) + 2) + tags + raw[2:])
    return path


@pytest.mark.parametrize('what', NONSENSE)
def test_a_nonsense_tag_does_not_lose_the_picture(tmp_path, what):
    stored = decode_image(saved(tmp_path/'stored.jpg', b'Exif\0\0'))
    tags = sorted([ORIENTATION[6], NONSENSE[what]])
    image = decode_image(saved(tmp_path/'a.jpg', exif(*tags, more=b'wide\0' + bytes(16))))
    assert torch.equal(image, stored.flip(1).transpose(1, 2))   # a quarter turn, clockwise


def test_every_orientation_is_as_pil_turns_it(tmp_path):
    for held in range(9):
        path = saved(tmp_path/'a.jpg', exif(ORIENTATION[held]))
        theirs = np.array(ImageOps.exif_transpose(Image.open(path)))
        assert torch.equal(decode_image(path), torch.from_numpy(theirs).permute(2, 0, 1))
        for name in ('a.png', 'a.tif', 'a.webp'):        # where the tag is stored in other ways
            tag = Image.Exif(); tag[0x0112] = held
            Image.fromarray(scene()).save(tmp_path/name, exif=tag, lossless=True)
            theirs = np.array(ImageOps.exif_transpose(Image.open(tmp_path/name)).convert('RGB'))
            theirs = torch.from_numpy(theirs).permute(2, 0, 1)
            assert torch.equal(decode_image(tmp_path/name), theirs)
    for tags in (b'Exif\0\0' + bytes(range(40)), exif(ORIENTATION[6])[:-9], b'Exif\0\0MM'):
        assert decode_image(saved(tmp_path/'a.jpg', tags)).shape in ((3, 48, 64), (3, 64, 48))


def tiff(path, bands, photometric=1, planar=1, extra=None):
    "Write (H, W, C) samples as a TIFF without compression, one strip per plane"
    height, width, n = bands.shape
    planes = [bands] if planar == 1 else [bands[..., i] for i in range(n)]
    planes = [np.ascontiguousarray(plane).tobytes() for plane in planes]
    tags = {256: (4, [width]), 257: (4, [height]), 258: (3, [8 * bands.itemsize] * n),
            259: (3, [1]), 262: (3, [photometric]), 273: (4, planes), 277: (3, [n]),
            278: (4, [height]),
            279: (4, [len(plane) for plane in planes]), 284: (3, [planar])}
    if extra is not None: tags[338] = 3, [extra] * (n - (3 if photometric == 2 else 1))
    at, head, data = 8 + 2 + 12 * len(tags) + 4, b'', b''
    pixels_at = at + 4 * 64                      # room for values that do not fit in a tag
    starts = np.cumsum([pixels_at] + [len(plane) for plane in planes])[:-1].tolist()
    for number, (kind, values) in sorted(tags.items()):
        values = starts if number == 273 else values
        packed = struct.pack(f'<{len(values)}{"HI"[kind == 4]}', *values)
        if len(packed) > 4: field, data = struct.pack('<I', at + len(data)), data + packed
        else: field = packed.ljust(4, b'\0')
        head += struct.pack('<HHI', number, kind, len(values)) + field
    path.write_bytes(b'II*\0' + struct.pack('<IH', 8, len(tags)) + head + bytes(4)
                     + data.ljust(4 * 64, b'\0') + b''.join(planes))
    return path


def test_a_tiff_that_is_not_read_says_what_it_holds(tmp_path):
    path, eight = tmp_path/'a.tif', np.dstack([scene(), np.full((48, 64), 7, np.uint8)])
    deep, whole = eight.astype(np.uint16) * 40, scene().astype(np.uint16) * 257
    as_stored = torch.from_numpy(scene()).permute(2, 0, 1)
    assert torch.equal(decode_image(tiff(path, eight, photometric=2, extra=0)), as_stored)
    assert torch.equal(decode_image(tiff(path, whole, photometric=2)), as_stored)
    for bands, how, words in ((deep[..., :2], dict(extra=0), '2 channels of 16 bits'),
                              (eight, dict(extra=0), '4 channels of 8 bits'),
                              (deep[..., :1].repeat(13, 2), {}, '13 channels of 16 bits'),
                              (eight, dict(photometric=2, extra=0, planar=2), '4 channels of 8'),
                              (deep, dict(photometric=2, extra=0), '4 channels of 16 bits')):
        assert words in reason(tiff(path, bands, **how)), words
        assert 'format' not in reason(path)


@pytest.mark.parametrize('top, kind', [(4095, np.uint16), (10000, np.uint16), (70000, np.int32)])
def test_a_picture_is_never_almost_black_without_a_word(tmp_path, top, kind):
    ramp = np.linspace(0, top, 64).astype(kind)[None].repeat(32, 0)
    Image.fromarray(ramp).save(tmp_path/'a.tif')
    assert f'go from 0 to {top}' in reason(tmp_path/'a.tif')
    low, high = re.search(r'--value-range (\d+) (\d+)', reason(tmp_path/'a.tif')).groups()
    image = decode_image(tmp_path/'a.tif', value_range=(float(low), float(high)))
    assert image[0, :, 0].max() == 0 and image[0, :, -1].min() > 128   # as the sentence says
    image = decode_image(tmp_path/'a.tif', value_range=(0, top))
    levels = torch.from_numpy((ramp * (256 / (top + 1))).astype(np.uint8))
    assert (image - levels).abs().max() == 0


def test_full_sixteen_bits_are_as_they_were(tmp_path):
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    for name in ('a.png', 'a.tif'):
        Image.fromarray(values).save(tmp_path/name)
        for how in ({}, dict(value_range=(0, 65535))):
            expected = torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, -1, -1)
            assert torch.equal(decode_image(tmp_path/name, **how), expected)


def test_transparent_parts_are_white_and_the_others_exact(tmp_path):
    alpha = np.dstack([scene(), np.full((48, 64), 255, np.uint8)])
    alpha[:24, :32, 3] = 0
    expected = torch.from_numpy(scene()).permute(2, 0, 1).clone(); expected[:, :24, :32] = 255
    Image.fromarray(alpha).save(tmp_path/'a.png'); Image.fromarray(alpha).save(tmp_path/'a.tif')
    Image.fromarray(alpha).save(tmp_path/'a.webp', lossless=True)
    Image.fromarray(scene()).save(tmp_path/'key.png', transparency=(220, 30, 30))
    for name in ('a.png', 'a.tif', 'a.webp', 'key.png'):
        assert torch.equal(decode_image(tmp_path/name), expected), name
    opaque = np.dstack([scene(), np.full((48, 64), 255, np.uint8)])
    Image.fromarray(opaque).save(tmp_path/'b.png')
    assert torch.equal(decode_image(tmp_path/'b.png'), torch.from_numpy(scene()).permute(2, 0, 1))


def test_the_limit_of_pixels_is_said_in_our_words(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1_000_000)
    Image.new('L', (2000, 1100)).save(tmp_path/'a.png')
    assert reason(tmp_path/'a.png').startswith('it has more than 2 megapixels; shrink it, cut it')


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    "Three JPEGs of 4.3 megapixels with edges and texture, in two class folders"
    folder = tmp_path_factory.mktemp('photographs')
    for i in range(3):
        random = np.random.default_rng(i)
        coarse = Image.fromarray(random.integers(0, 256, (18, 24, 3), dtype=np.uint8))
        image = np.asarray(coarse.resize((2400, 1800), Image.Resampling.NEAREST)).astype(int)
        image = (image + random.normal(0, 6, (1800, 2400, 1))).clip(0, 255).astype(np.uint8)
        (folder/f'{i % 2}').mkdir(exist_ok=True)
        Image.fromarray(image).save(folder/f'{i % 2}'/f'{i}.jpg', quality=90)
    return folder


def test_fast_decoding_changes_crops_by_little_and_nothing_else(photographs):
    settings = ViewSettings(global_size=64, local_size=32, n_local=4)
    exact, fast = (MultiCrop(open_images(photographs).set_decoding(decode=how), settings, seed=3)
                   for how in ('exact', 'fast'))
    for i in range(3):
        a, b = exact[5, i], fast[5, i]
        for one, other in zip(a.params, b.params): assert torch.equal(one, other)
        for one, other in zip(a.crops, b.crops):
            off = (one.int() - other.int()).abs().float()
            assert 0 < off.mean() < 5          # gray levels; edges as sharp as these are rare
    # what does not come from a large JPEG is the same, bit for bit
    images = Shapes(2, size=96).images
    source = ImageSource(images, ['a', 'b']).set_decoding(decode='fast')
    params = sample_views(settings, 0, 1, [1], [(96, 96)]).rows(0)
    crops = MultiCrop(source, settings)[1, 1].crops, crop_views(images[1], params, settings)
    for a, b in zip(*crops): assert torch.equal(a, b)


def test_fast_views_are_the_same_in_any_number_of_workers(photographs):
    source, settings = open_images(photographs).set_decoding(decode='fast'), ViewSettings(n_local=2)
    views = [list(file_views(source, [[(0, 2), (1, 0)]], settings, 0, torch.device('cpu'), n))
             for n in (0, 2)]
    for a, b in zip(views[0][0][0], views[1][0][0]): assert torch.equal(a, b)


def test_evaluation_of_large_photographs(photographs):
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
    exact, fast = (extract_features(network, open_images(photographs).set_decoding(decode=how), 64)
                   for how in ('exact', 'fast'))
    assert 0 < (exact - fast).abs().mean() < 0.03        # of a standard deviation of the pixels
    pixels = [raw_pixel_features(open_images(photographs).set_decoding(decode=how))
              for how in ('exact', 'fast')]
    off = (pixels[0] - pixels[1]).abs()
    assert off.mean() < 0.003 and off.max() < 0.02


def test_small_jpegs_are_decoded_as_ever(images):
    exact, fast = (open_images(images).set_decoding(decode=how) for how in ('exact', 'fast'))
    for i in range(len(exact)):
        assert torch.equal(exact[i], fast.read(i, lambda height, width: 8)[0])


def run_main(folder, *words):
    "Exit status and what the script prints, run in this process"
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try: main([*map(str, words), '--out', str(folder), *SMALL])
        except SystemExit as end: status = end.code
    return status, out.getvalue(), err.getvalue()


def test_the_value_range_of_a_run(tmp_path):
    "Microscope pictures: refused with the range, then trained with it, which the record holds"
    for i in range(20):
        values = np.random.default_rng(i).integers(0, 4096, (48, 48)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path/f'{i}.png')
    status, out, err = run_main(tmp_path/'run', '--data', tmp_path)
    assert status == 2 and '--value-range 0 4095' in err and not (tmp_path/'run').exists()
    assert err.count('\n') == 1 and len(err) < 1000
    words = '--data', tmp_path, '--value-range', 0, 4095, '--decode', 'exact'
    status, out, err = run_main(tmp_path/'run', *words)
    assert (status, err) == (0, '')
    record = json.loads((tmp_path/'run'/'config.json').read_text())
    assert (record['value_range'], record['decode']) == ([0, 4095], 'exact')
    assert 'finished' in run_main(tmp_path/'run', *words)[1]
    for name in ('value_range', 'decode'): del record[name]      # as an older version wrote it
    (tmp_path/'run'/'config.json').write_text(json.dumps(record))
    assert 'finished' in run_main(tmp_path/'run', *words)[1]
    for wrong in (['5', '1'], ['7'], ['a', 'b']):
        status, out, err = run_main(tmp_path/'no', '--data', tmp_path, '--value-range', *wrong)
        assert status == 2 and err.count('\n') == 1 and 'value' in err
