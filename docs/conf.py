"Sphinx settings; what they are about comes from settings.ini."
import sys
from pathlib import Path

from nbdev.config import get_config

cfg = get_config()
sys.path.insert(0, str(Path(__file__).parent)) # slugs

project, author, copyright = cfg.title, cfg.author, cfg.copyright
html_title, html_baseurl = cfg.title, f'{cfg.doc_host}{cfg.doc_baseurl}/'
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx.ext.githubpages']

nb_execution_mode = 'off' # pages show the stored outputs
nb_render_markdown_format = 'myst'
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'amsmath', 'html_image', 'strikethrough']
myst_heading_anchors, myst_heading_slug_func = 4, 'slugs.pandoc'
suppress_warnings = ['myst.header'] # a notebook may skip a heading level

html_theme = 'furo'
html_static_path = ['_static', str(cfg.config_path/'_proc'/'_static')] # the second: MathJax
html_css_files = ['site.css']
html_theme_options = dict(top_of_page_buttons=[])
html_use_index = html_show_sourcelink = html_copy_source = False
mathjax_path, mathjax_options = 'mathjax/tex-svg.js', dict(defer='defer')
