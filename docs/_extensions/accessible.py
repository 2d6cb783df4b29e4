"""The theme's pages say to a screen reader what they show, and scroll by the keyboard what is too wide."""

import re
from html import escape
from pathlib import Path
from typing import Any

REPAIRS = (
    (r'<p class="caption" role="heading">', '<p class="caption" role="heading" aria-level="2">'),
    (r'<aside class="sidebar-drawer">', '<aside class="sidebar-drawer" aria-label="All pages">'),
    (r'<aside class="toc-drawer', '<aside aria-label="Sections of this page" class="toc-drawer'),
    (r"<pre(?=[ >])(?! tabindex)", '<pre tabindex="0"'),
    (r'<div class="table-wrapper', '<div tabindex="0" class="table-wrapper'),
    (r'<div class="math', '<div tabindex="0" class="math'),
    (r'<th class="([^"]*)"><p></p></th>', r'<td class="\1"></td>'),  # the corner of a table heads nothing
)
# The gallery hides the text of a thumbnail's link.
THUMBNAIL = re.compile(
    r'(<div class="sphx-glr-thumbcontainer".*?<a class="reference internal")'
    r'( href="[^"]*"><span class="doc">(.*?)</span>)',
    re.S,
)


def repair(app: Any, failed: Exception | None) -> None:
    """Mend each page that was written."""
    if failed or app.builder.name != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        text = mended = page.read_text()
        for pattern, replacement in REPAIRS:
            mended = re.sub(pattern, replacement, mended)
        mended = THUMBNAIL.sub(lambda m: f'{m[1]} aria-label="{escape(re.sub("<.*?>", "", m[3]))}"{m[2]}', mended)
        if mended != text:
            page.write_text(mended)


def setup(app: Any) -> dict[str, bool]:
    """After all pages are written."""
    app.connect("build-finished", repair)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
