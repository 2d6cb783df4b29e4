"""A built site leads nowhere that isn't there, loads nothing from elsewhere, and describes every image.

python docs/check_site.py FOLDER
"""

import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


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
    if not pages:
        faults.append(f"{site} has no pages")
    return faults


if __name__ == "__main__":
    found = find_faults(Path(sys.argv[1]).resolve())
    print("\n".join(found) or "Every link inside the site leads somewhere, and every image has an alternative text.")
    sys.exit(bool(found))
