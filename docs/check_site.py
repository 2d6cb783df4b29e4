"""A built site leads nowhere that isn't there, loads nothing from elsewhere, and can be read without eyes or a mouse.

python docs/check_site.py FOLDER
"""

import sys
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


def find_unreadable(page: BeautifulSoup) -> list[str]:
    """What a screen reader or a keyboard does not reach on a page; axe-core finds more, in a browser."""
    faults = []
    if not (page.html and page.html.get("lang")) or not (page.title and page.title.get_text().strip()):
        faults.append("has no language, or no title")
    levels = [int(tag.name[1]) for tag in page.select("h1, h2, h3, h4, h5, h6")]
    if levels.count(1) != 1:
        faults.append(f"has {levels.count(1)} headings of the first level")
    if any(after > before + 1 for before, after in pairwise(levels)):
        faults.append(f"leaves a level of headings out: {levels}")
    for tag in page.select("a[href], button"):
        if not (tag.get_text().strip() or tag.get("aria-label") or tag.find("img", alt=True)):
            faults.append(f"{str(tag)[:80]} has no name")
    for tag in page.select("pre, .table-wrapper"):
        if not tag.has_attr("tabindex"):
            faults.append(f"{str(tag)[:80]} can't be scrolled by the keyboard")
    if any(not tag.get_text().strip() for tag in page.select("th")):
        faults.append("has a table with an empty heading")
    seen: set[str] = set()
    for tag in page.find_all(id=True):
        if tag["id"] in seen:
            faults.append(f"has two elements #{tag['id']}")
        seen.add(tag["id"])
    return faults


def find_faults(site: Path) -> list[str]:
    """One line for each fault; links to other sites are not followed."""
    pages = {path: BeautifulSoup(path.read_text(), "html.parser") for path in sorted(site.rglob("*.html"))}
    pages = {path: page for path, page in pages.items() if "_static" not in path.relative_to(site).parts}
    anchors = {path: {tag["id"] for tag in page.find_all(id=True)} for path, page in pages.items()}
    faults = []
    for path, page in pages.items():
        where = path.relative_to(site)
        for tag in page.find_all(["a", *LOADED]):
            target = tag.get(LOADED.get(tag.name, "href"))
            url = urlsplit(target or "")
            if not target or url.scheme in ("mailto", "data"):
                continue
            if url.scheme or url.netloc:
                if tag.name in LOADED and tag.get("rel") != ["canonical"]:
                    faults.append(f"{where}: loads {target} from elsewhere")
                continue
            file = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not (file.exists() and file.is_relative_to(site)):
                faults.append(f"{where}: {target} leads nowhere")
            elif url.fragment and file in anchors and unquote(url.fragment) not in anchors[file]:
                faults.append(f"{where}: {target} has no such anchor")
        for image in page.find_all("img"):
            for entry in filter(None, (image.get("srcset") or "").split(",")):
                if not (path.parent / unquote(entry.split()[0])).exists():
                    faults.append(f"{where}: srcset {entry.strip()} leads nowhere")
            # Sphinx writes the path of an image that nobody has described.
            if (image.get("alt") or "").strip() in ("", image.get("src")):
                faults.append(f"{where}: {image.get('src')} has no alternative text")
        faults += [f"{where}: {fault}" for fault in find_unreadable(page)]
    if not pages:
        faults.append(f"{site} has no pages")
    return faults


if __name__ == "__main__":
    found = find_faults(Path(sys.argv[1]).resolve())
    print(
        "\n".join(found)
        or "Every link inside the site leads somewhere, and every page can be read without eyes or a mouse."
    )
    sys.exit(bool(found))
