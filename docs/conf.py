"""Sphinx: sphinx-build -W -b html docs docs/_build"""

import sys
from itertools import pairwise
from pathlib import Path

from sphinx.application import Sphinx

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))

import featurecache  # noqa: E402

project = "featurecache"
author = "featurecache contributors"
version = release = featurecache.__version__
extensions = ["myst_parser", "sphinx_click", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {
    "description": "Features of a frozen backbone, once; small heads, compared.",
    "page_width": "1280px",
    "body_max_width": "auto",
    "sidebar_width": "220px",
    "show_relbars": True,
}
html_sidebars = {"**": ["about.html", "navigation.html", "searchbox.html"]}
myst_heading_anchors = 3
autodoc_typehints = "none"  # the signatures have them
default_role = "code"  # docstrings write `name` for code
highlight_language = "text"
smartquotes = False  # "--" begins an option


def as_code(lines: list[str]) -> list[str]:
    """Lines that click keeps as they are are commands: in a block of code, not a block of lines."""
    result: list[str] = []
    for before, line in pairwise(["", *lines]):
        if line.startswith("| "):
            result += [] if before.startswith("| ") else ["::", ""]
            line = f"   {line[2:]}"
        result.append(line)
    return result


def setup(app: Sphinx) -> None:
    def process(_app: Sphinx, _ctx: object, lines: list[str]) -> None:
        lines[:] = as_code(lines)

    app.connect("sphinx-click-process-description", process)
