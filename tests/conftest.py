import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def pytest_collection_modifyitems(items):
    "Keep the tests that share the copy in one process, when pytest runs several"
    for item in items:
        if 'again' in item.fixturenames: item.add_marker(pytest.mark.xdist_group('again'))


@pytest.fixture(scope='session')
def again(tmp_path_factory): return Again(tmp_path_factory.mktemp('again'))
