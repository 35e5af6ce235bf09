"""How Sphinx builds the site from what tools/docs.py prepares. Nothing is executed, nothing is fetched."""
import os, sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
settings = ConfigParser()
settings.read(HERE.parent/'settings.ini')
settings = settings['DEFAULT']

project = settings['title']
author = settings['author']
copyright = settings['copyright']
release = version = settings['version']

extensions = ['myst_nb', 'sphinx.ext.mathjax', 'sphinx.ext.githubpages', 'names']
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence']
nb_execution_mode = 'off'
nb_output_stderr = 'remove'
nb_merge_streams = True
exclude_patterns = ['files/**/*.md', 'files/**/*.ipynb']
suppress_warnings = ['config.cache'] # of Sphinx's own bookkeeping, not of pages

html_theme = 'furo'
html_title = f'{project} {version}'
html_short_title = project
html_static_path = ['static']
html_css_files = ['site.css']
html_js_files = [('site.js', dict(defer='defer'))]
html_copy_source = False
html_show_sphinx = False
html_show_search_summary = True
html_domain_indices = False
html_use_index = False
html_theme_options = dict(navigation_with_keys=True, top_of_page_buttons=[])
if settings.get('git_url'): html_theme_options |= dict(source_repository=settings['git_url'], source_branch='main')
pygments_style = 'tango'
pygments_dark_style = 'github-dark'
mathjax_path = 'tex-svg.js' # one file with its glyphs, copied by tools/docs.py
mathjax3_config = dict(svg=dict(fontCache='global'), options=dict(enableMenu=False, enableAssistiveMml=False))
