"Pictures as people have them: what is opened, what it looks like, and what is said about the rest."
import os
import socket
import subprocess
import sys
import tarfile

import pytest
from PIL import Image

from dino_nb.data import BadImage, IMAGE_EXTENSIONS, decode_image, open_images
from dino_nb.shards import BadShard, open_shards

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
    assert len(source) == 1
    assert (source[0][:, 16, 16].int() - decode_image(tmp_path/f'a{suffix}')[:, 0, 0].int()).abs().max() < 9
    assert abs(int(source[0][0, 16, 16]) - 200) < 9
