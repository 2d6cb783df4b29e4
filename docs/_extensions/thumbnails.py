"""The gallery's thumbnails say what they show: sphinx-gallery leaves their alternative text empty."""

import re
from typing import Any

from docutils import nodes


def describe(app: Any, doctree: nodes.document, docname: str) -> None:
    """Give each thumbnail its page's title, which the page itself has found by now."""
    for image in doctree.findall(nodes.image):
        script = re.search(r"sphx_glr_(plot_\w+?)_thumb\.png", image["uri"])
        if script and not image.get("alt"):
            image["alt"] = f"A figure of the page “{app.env.titles[f'story/{script[1]}'].astext()}”"


def setup(app: Any) -> dict[str, bool]:
    """After all pages are read."""
    app.connect("doctree-resolved", describe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
