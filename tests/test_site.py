"The docs site: it builds without a warning, its links lead somewhere, it needs no network."
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import pytest


class Page(HTMLParser):
    "The anchors of a page, where its links lead, and what it loads"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = {''}, [], []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attributes):
        has = dict(attributes)
        self.ids.add(has.get('id'))
        if tag == 'a' and 'href' in has: self.links.append(has['href'])
        if tag == 'link' and has['rel'] != 'canonical': self.loads.append(has['href'])
        if 'src' in has: self.loads.append(has['src'])


def is_external(link): return re.match(r'(\w+:)?//|mailto:', link)


@pytest.fixture(scope='module')
def pages(again):
    if again.built.returncode: pytest.skip('the site was not built')
    return {path.name: Page(path) for path in again.site.glob('*.html')}


def test_site_builds_without_a_warning(again):
    assert again.built.returncode == 0, again.built.stdout + again.built.stderr


def test_every_notebook_has_a_page(again, pages):
    books = {re.sub(r'^\d+_', '', p.stem) + '.html' for p in again.top.glob('nbs/*.ipynb')}
    assert books <= pages.keys()


def test_links_lead_somewhere(again, pages):
    broken = []
    for name, page in pages.items():
        for link in page.links + page.loads:
            if is_external(link) or link.startswith('data:'): continue
            path, anchor = map(unquote, urldefrag(link))
            path = path.split('?')[0] or name
            missing = path in pages and anchor not in pages[path].ids
            if missing or not (again.site/path).exists(): broken.append((name, link))
    assert not broken


def test_pages_load_nothing_from_the_network(pages):
    loads = [(name, load) for name, page in pages.items() for load in page.loads]
    assert not [(name, load) for name, load in loads if is_external(load)]


@pytest.mark.skipif(not shutil.which('chromium'), reason='needs chromium')
def test_math_is_rendered_without_a_network(again, pages, tmp_path):
    flags = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync '
             '--disable-background-networking --disable-component-update --dump-dom '
             '--virtual-time-budget=20000').split()
    flags += [f'--user-data-dir={tmp_path}', '--host-resolver-rules=MAP * ~NOTFOUND']
    done = subprocess.run(['chromium', *flags, (again.site/'softmax.html').as_uri()],
                          text=True, capture_output=True, timeout=120)
    assert '<mjx-container' in done.stdout
    assert '<merror' not in done.stdout and 'class="math' in done.stdout


def test_checks_of_arguments_are_folded(again, pages):
    "A click shows them; what is explained stands open"
    text = (again.site/'checkpoint.html').read_text(encoding='utf-8')
    folded = re.findall(r'<details class="[^"]*hide.*?</details>', text, flags=re.S)
    plain = ' '.join(re.sub('<[^>]+>', '', part) for part in folded)
    assert 'def check_moments' in plain and 'def save_checkpoint' not in plain
