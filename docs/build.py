"""Build the docs site and README.md from the notebooks, without Quarto: `python docs/build.py`

nbdev prepares each notebook (hidden cells dropped, symbols linked, definitions documented),
`adapt` turns the result into what MyST-NB reads, and Sphinx writes the site to `_docs/`."""
import ast, os, re, runpy, shutil, sys
from importlib.metadata import files
from pathlib import Path

import nbformat, yaml
from docutils.nodes import make_id
from fastcore.foundation import L
from nbconvert import MarkdownExporter
from nbdev import processors
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export, patch_name
from nbdev.serve import proc_nbs
from sphinx.cmd.build import main as sphinx
from traitlets.config import Config

CFG  = get_config()
ROOT = CFG.config_path
SITE = f'{CFG.doc_host}{CFG.doc_baseurl}'.rstrip('/')
BLOB = f'{CFG.git_url}/blob/{CFG.branch}'
PARTS = ['Start', 'Method', 'Method', 'Data', 'Training', 'Evaluation', 'Experiments',
         'Using it'] # by first digit

OPTION  = re.compile(r'^#\|\s*([\w-]+)\s*:?\s*(.*?)\s*$')
SOURCE  = re.compile(r'\[source\]\((\S+?)\)\{target="_blank"[^}]*\}\s*')
SYMBOL  = re.compile(r'\[`([^`]+)`\]\(' + re.escape(SITE) + r'/([\w-]+\.html#[^)\s]+)\)')
NB_LINK = re.compile(r'(?<=\]\()(?!\w+:)([^)#\s]+)\.ipynb')
IMAGE   = re.compile(r'(!\[[^\]]*\]\()(?!\w+:)')
md = nbformat.v4.new_markdown_cell


class ShowDocs(processors.exec_show_docs):
    "Run `show_doc` where the module is known, so that annotations may name what comes later"
    def begin(self):
        super().begin()
        module = processors._default_exp(self.nb)
        if module: self.k.run_cell(f'from {CFG.lib_path.name}.{module} import *')

processors.exec_show_docs = ShowDocs


def page(name):
    "`12_loss.ipynb` -> `loss`: the page's name in `_modidx.py`, and in Quarto too"
    return re.sub(r'^\d+[a-zA-Z0-9]*_', '', Path(name).stem.lower())


def site_links(text):
    "Point links to symbols and to other notebooks at pages of the site"
    text = SYMBOL.sub(r'<a href="\2"><code class="literal">\1</code></a>', text)
    return NB_LINK.sub(lambda m: page(m[1]) + '.ipynb', text)


def readme_links(text):
    "Point links at the published site, and images into the repository"
    text = NB_LINK.sub(lambda m: f'{SITE}/{page(m[1])}.html', text)
    return IMAGE.sub(rf'\1{CFG.nbs_path.name}/', text)


def options(cell):
    "The leading `#|` options of a code cell, and its source without them"
    opts, lines = {}, cell.source.splitlines()
    while lines and (m := OPTION.match(lines[0])): opts[m[1]] = m[2].strip('\'"'); lines.pop(0)
    return opts, '\n'.join(lines)


def show_docs(cells):
    "What nbdev's `show_doc` cells say: {name: (address of the source, signature and docstring)}"
    docs = {}
    is_doc = lambda c: c.cell_type == 'code' and options(c)[0].get('output') == 'asis'
    for cell in filter(is_doc, cells):
        for text in (o.data.get('text/markdown') for o in cell.outputs if 'data' in o):
            if not text: continue
            link, text = SOURCE.search(text), SOURCE.sub('', text).replace('---\n', '', 1).strip()
            head, _, body = text.partition('\n')
            fence = re.split(r'(^```.*?^```$)', body, flags=re.M|re.S) # no links inside of code
            body = ''.join(SYMBOL.sub(r'`\1`', s) if s.startswith('```') else s for s in fence)
            docs[head.lstrip('# ').strip('`').replace('\\', '')] = link[1] if link else '', body
    return docs


def anchors(rel, documented):
    "The anchors that `_modidx.py` promises on a page, by the documented name they belong to"
    found = {}
    for module, syms in runpy.run_path(str(CFG.lib_path/'_modidx.py'))['d']['syms'].items():
        for key, (target, _) in syms.items():
            name, (html, anchor) = key.removeprefix(module + '.'), target.split('#')
            owners = [n for n in documented if f'{name}.'.startswith(f'{n}.')]
            owner = max(owners, key=len, default='')
            if html == f'{page(rel)}.html': found.setdefault(owner, []).append(anchor)
    return found


def html_anchors(names): return ''.join(f'<a id="{n}"></a>' for n in names)


def title(front, rel, module, names):
    "The head of a page: title, promise, and where it comes from"
    origin = f'<a href="{BLOB}/{CFG.nbs_path.name}/{rel}">{rel}</a>'
    if module: origin += f' · exports <a href="{BLOB}/{module}">{module}</a>'
    if rel == CFG.readme_nb: origin = f'<a href="{CFG.git_url}">{CFG.git_url}</a>'
    return md(f"# {front['title']}\n\n*{front.get('description', '')}*\n\n"
              f'<p class="nb-origin">{origin}</p>\n\n{html_anchors(names)}')


def definition(names, docs, promised, body=''):
    "The heading over definitions: their anchors and a link to the source"
    ids = [a for n in names for a in promised.get(n, []) if a != make_id(n)] # a heading has its own
    link = next((docs[n][0] for n in names if docs[n][0]), '')
    link = f'<p class="nb-source"><a href="{link}">source</a></p>' if link else ''
    heading = ', '.join(f'`{n}`' for n in names)
    return md(f'{html_anchors(ids)}\n\n### {heading}\n\n{link}\n\n{body}')


def defined(src):
    "The names that exported source defines"
    nodes = [n for n in ast.parse(src).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return [m for n in nodes for m in L(patch_name(n))]


def is_folded(cell):
    "Whether exported code only checks arguments or draws: a click shows it, its text is there"
    opts, src = options(cell)
    names = defined(src) if 'code-summary' in opts else []
    return bool(names) and all(re.match(r'_?(check|show|plot)_', name) for name in names)


def alt_text(after):
    "What the text after a figure says of it: an italic caption, or else the first sentence"
    text = after.source.strip() if after and after.cell_type == 'markdown' else ''
    if not text or text.startswith('#'): return 'Figure'
    caption = re.match(r'\*([^*]+)\*', text)
    said = caption[1] if caption else re.split(r'\n\n|(?<=[.?!])\s', text)[0]
    return ' '.join(re.sub(r'\[([^]]+)\]\([^)]*\)|[*`$]', r'\1', said).split())


def code_cell(cell, after):
    "A code cell with the tags that MyST-NB and the style sheet know"
    opts, src = options(cell)
    tags = {'exported': 'code-summary' in opts, 'remove-input': opts.get('echo') == 'false',
            'remove-output': opts.get('output') == 'false', 'hide-input': is_folded(cell)}
    meta = dict(tags=[tag for tag, on in tags.items() if on])
    meta['mystnb'] = dict(image=dict(alt=alt_text(after)))
    return nbformat.from_dict({**cell, 'source': src, 'metadata': meta})


def adapt(nb, rel, links=site_links):
    "Turn a notebook processed by nbdev into one that MyST-NB can read"
    docs = show_docs(nb.cells)
    promised = anchors(rel, docs)
    module = f'{CFG.lib_path.name}/{page(rel)}.py' if docs else None
    shown = {c.id: [n for n in defined(src) if n in docs] for c in nb.cells if c.cell_type == 'code'
             for opts, src in [options(c)] if 'code-summary' in opts}
    visible, cells = sum(shown.values(), []), []
    for cell, after in zip(nb.cells, nb.cells[1:] + [None]):
        if cell.cell_type == 'raw' and cell.source.startswith('---'):
            front = yaml.safe_load(cell.source.strip().strip('-'))
            cells.append(title(front, rel, module, promised.get('', [])))
        elif cell.cell_type == 'markdown' and 'THIS FILE WAS AUTOGENERATED' not in cell.source:
            cells.append(md(links(cell.source)))
        elif cell.cell_type == 'code' and options(cell)[0].get('output') == 'asis':
            # Where the source is shown, its signature and docstring need not be shown twice
            cells += [definition([name], docs, promised, links(body))
                      for name, (_, body) in show_docs([cell]).items() if name not in visible]
        elif cell.cell_type == 'code' and (options(cell)[1].strip() or cell.outputs):
            names, folded = shown.get(cell.id), is_folded(cell)
            if names and not folded: cells.append(definition(names, docs, promised))
            for name in names if names and folded else ():
                cells.append(definition([name], docs, promised, links(docs[name][1])))
            cells.append(code_cell(cell, after))
    python = dict(language_info=dict(name='python', pygments_lexer='ipython3'))
    nb.cells, nb.metadata = cells, nbformat.from_dict(python)
    return nb


def contents(books):
    "The sidebar: hidden tables of contents, one per part of the book, in notebook order"
    parts = {}
    for book in books:
        number, title = book.stem.split('_')[0], nbformat.read(book, 4).cells[0].source
        title = yaml.safe_load(title.strip().strip('-'))['title']
        entry = f'{number} · {title} <{page(book)}>'
        parts.setdefault(PARTS[min(int(number[0]), len(PARTS) - 1)], []).append(entry)
    tree = '```{toctree}\n:hidden:\n:caption: %s\n\n%s\n```'
    return md('\n\n'.join(tree % (part, '\n'.join(entries)) for part, entries in parts.items()))


def stage(proc, out):
    "Write the processed notebooks in `proc`, adapted, and their images to `out`"
    books = sorted(proc.glob('*.ipynb'))
    for book in books:
        nb = adapt(nbformat.read(book, 4), book.name)
        if book.name == CFG.readme_nb: nb.cells.append(contents(b for b in books if b != book))
        nbformat.write(nb, out/f'{page(book)}.ipynb')
    if (proc/'images').exists(): shutil.copytree(proc/'images', out/'images')


def readme(proc):
    "Write README.md, and the figures in it, from the processed front page"
    nb = adapt(nbformat.read(proc/CFG.readme_nb, 4), CFG.readme_nb, readme_links)
    nb.cells[0].source = re.sub(r'\n*<p class="nb-origin">.*', '', nb.cells[0].source, flags=re.S)
    hide = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags={'remove-input'}))
    names = dict(unique_key='index', output_files_dir='index_files')
    text, resources = MarkdownExporter(config=hide).from_notebook_node(nb, resources=names)
    for name, data in resources['outputs'].items():
        (ROOT/name).parent.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(data)
    alts = (c.metadata.mystnb.image.alt for c in nb.cells if c.cell_type == 'code'
            for out in c.outputs if 'image/png' in out.get('data', {}))
    text = re.sub(r'!\[png\]', lambda _: f'![{next(alts)}]', text)
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', text, flags=re.M)).strip()
    note = f'<!-- Made from {CFG.nbs_path.name}/{CFG.readme_nb} by docs/build.py: do not edit. -->'
    (ROOT/'README.md').write_text(f'{note}\n\n{text}\n', encoding='utf-8')


def mathjax(out):
    "Copy MathJax from the installed package, so that pages load nothing from the network"
    file = next(f for f in files('sphinx-mathjax-offline') if f.match('static/mathjax/tex-svg.js'))
    out.mkdir(parents=True)
    shutil.copy(file.locate(), out)


def build():
    "Export, then write README.md and the site; return Sphinx's exit status"
    nbdev_export.__wrapped__()
    proc = proc_nbs(n_workers=0, force=True) # in this process, where ShowDocs is known
    src, html = proc/'_src', proc/'_html'
    src.mkdir()
    stage(proc, src)
    readme(proc)
    mathjax(proc/'_static'/'mathjax')
    strict = ['-q', '-W', '--keep-going']
    status = sphinx([*strict, '-c', 'docs', '-d', str(proc/'_trees'), str(src), str(html)])
    if status: return status
    shutil.rmtree(CFG.doc_path, ignore_errors=True)
    shutil.move(html, CFG.doc_path)
    print(f"The site: {(CFG.doc_path/'index.html').resolve().as_uri()}")


if __name__ == '__main__':
    os.chdir(ROOT)
    sys.exit(build())
