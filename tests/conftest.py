import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from processes import Forks
from torchvision.transforms.functional import to_pil_image

from dino_nb.shapes import Shapes

ROOT = Path(__file__).parent.parent


class Again:
    "A copy of the notebooks, from which modules, README.md and the site were made anew"
    def __init__(self, top):
        self.top, self.site = top, top/'_docs'
        for name in 'settings.ini', 'pyproject.toml': shutil.copy(ROOT/name, top)
        hidden = shutil.ignore_patterns('__pycache__', '.*')
        for name in 'nbs', 'docs': shutil.copytree(ROOT/name, top/name, ignore=hidden)
        (top/'dino_nb').mkdir()
        self.built = self.run(sys.executable, 'docs/build.py')

    def run(self, *command):
        # With IN_TEST in the environment nbdev exports nothing
        env = {name: value for name, value in os.environ.items() if name != 'IN_TEST'}
        return subprocess.run(command, cwd=self.top, env=env | {'PYTHONPATH': str(self.top)},
                              text=True, capture_output=True, timeout=600)

    def differing(self, pattern):
        "The paths under pattern that are not the same here and in the repository"
        paths = {p.relative_to(top) for top in (ROOT, self.top) for p in top.glob(pattern)}
        read = lambda path: path.read_bytes() if path.exists() else None
        return sorted(str(p) for p in paths if read(ROOT/p) != read(self.top/p))


# Files whose tests share what takes long to make: one process runs them, when pytest runs several
GROUPS = dict(test_repository='again', test_site='again', test_kills='kills', test_accidents='kills')


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Not by xdist's own marks: xdist 3.8 writes them where pytest 9.2 does not look"
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return GROUPS.get(Path(nodeid.split('::')[0]).stem, nodeid)

    return ByGroup(config, log)


@pytest.fixture(scope='session')
def again(tmp_path_factory): return Again(tmp_path_factory.mktemp('again'))


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    "A folder of 96 JPEGs in two class folders"
    folder, shapes = tmp_path_factory.mktemp('images'), Shapes(96, size=40)
    for i, (image, label) in enumerate(zip(shapes.images, shapes.labels)):
        (folder/f'class_{label % 2}').mkdir(exist_ok=True)
        to_pil_image(image).save(folder/f'class_{label % 2}'/f'{i:03}.jpg')
    return folder


@pytest.fixture(scope='session')
def job():
    "Starts the script without the seconds that imports take"
    forks = Forks()
    yield forks
    forks.process.kill()


class SmallDisk:
    "A file system of few bytes, which can be filled and emptied"
    def __init__(self, path): self.path = path

    def fill(self, leave=0):
        "Leave so many bytes (in blocks of 4096)"
        room = os.statvfs(self.path)
        with suppress(OSError):                            # somebody was quicker: it is full, too
            (self.path/'ballast').write_bytes(bytes(room.f_bavail * room.f_frsize - leave))

    def empty(self): (self.path/'ballast').unlink()


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 64 MB"
    path = tmp_path/'disk'
    path.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64m', 'none', path]
    if not shutil.which('mount') or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('a disk that really runs full needs the right to mount one')
    yield SmallDisk(path)
    subprocess.run(['umount', '-l', path], check=True)
