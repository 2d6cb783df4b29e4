"""Sphinx's settings: pages in Markdown, a gallery of scripts that are run, API pages from docstrings."""

import os
import sys
from pathlib import Path

import pyro_vae

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))
from links import write_inventories  # noqa: E402

# The gallery's scripts run in processes of their own, which inherit this: one thread each, and no search for modules.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE / "_extensions"), os.environ.get("PYTHONPATH")]))

project = "pyro_vae"
author = "The pyro_vae developers"
copyright = author
version = release = pyro_vae.__version__

extensions = [
    "accessible",
    "links",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "plain_docstrings",
    "thumbnails",
]
exclude_patterns = ["_build", "_templates", "**/sg_execution_times.rst", "sg_execution_times.rst"]
templates_path = ["_templates"]

myst_enable_extensions = ["colon_fence", "dollarmath", "fieldlist", "substitution"]
myst_substitutions = {"version": release}
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_rtype = False

default_role = "code"  # `name` in a docstring
nitpicky = True
# Code is a link where its name has a page; `links` makes a reference of this type of each.
nitpick_ignore_regex = [("py:obj", r".*"), ("py:.*", r"(torch|pyro|pandas|numpy|matplotlib|arviz|xarray)\..*")]
intersphinx_mapping = write_inventories(HERE / "_build" / "inventories")

html_theme = "furo"
html_title = f"pyro_vae {release}"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["pyro_vae.css"]
html_show_sphinx = False
html_show_sourcelink = html_copy_source = False
html_search_scorer = str(HERE / "_static" / "scorer.js")
SIDEBAR = ("scroll-start", "brand", "version", "search", "navigation", "scroll-end")
html_sidebars = {"**": [f"sidebar/{part}.html" for part in SIDEBAR]}
html_theme_options = {
    "light_logo": "logo.svg",
    "dark_logo": "logo-dark.svg",
    "navigation_with_keys": True,
    "top_of_page_buttons": [],
}

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "story",
    "ignore_pattern": r"(svi_digits|front_page)\.py",
    "within_subsection_order": "FileNameSortKey",
    "doc_module": ("pyro_vae",),
    "backreferences_dir": "api/backreferences",
    "reset_modules": ("matplotlib", "fresh_start.reset"),
    # A script is judged by the package that it runs on, which may have changed where the script has not.
    "run_stale_examples": True,
    "capture_repr": (),
    "image_srcset": ["2x"],
    "thumbnail_size": (640, 320),
    "parallel": 2,
    "show_memory": False,
    "min_reported_time": 0,
    "remove_config_comments": True,
    "download_all_examples": False,
}
