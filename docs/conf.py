"""Sphinx configuration: `sphinx-build -W --keep-going docs docs/_build`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

project = "comoe"
html_title = "comoe"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
smartquotes = False  # "--resume" stays as it is typed
highlight_language = "text"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
