"""Names in code are links, also to other packages without a network at build time; questions are in the index."""

import re
import zlib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import index, pending_xref
from sphinx.transforms import SphinxTransform

NAMES = Path(__file__).parents[1] / "external_names.txt"
NAME = re.compile(r"(?:pv|pyro_vae|torch|pyro|numpy|pandas|matplotlib|arviz)(?:\.\w+)+(?=\(|$)|DataLoader$|torchrun$")


def external() -> dict[str, tuple[str, list[str]]]:
    """By project: its address, and the lines of its names."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in NAMES.read_text().splitlines():
        if line.startswith("#"):
            continue
        words = line.split()
        if len(words) == 2:
            project = words[0]
            found[project] = words[1], []
        else:
            role, name, page = words
            found[project][1].append(f"{name} py:{role} 1 {page} -")
    return found


def write_inventories(folder: Path) -> dict[str, tuple[str, str]]:
    """Write an inventory of Sphinx's second version for each project; intersphinx's mapping to them."""
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {}
    for project, (address, lines) in external().items():
        head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        path = folder / f"{project}.inv"
        path.write_bytes(head.encode() + zlib.compress("".join(f"{line}\n" for line in lines).encode()))
        mapping[project] = address, str(path)
    return mapping


class LinkNames(SphinxTransform):
    """Makes a reference of each name of this package, or of the list, in code that is neither a link nor a heading."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Change the page."""
        listed = {line.split()[0] for _, lines in external().values() for line in lines}
        for literal in list(self.document.findall(nodes.literal)):
            found = NAME.match(literal.astext())
            if not found or isinstance(literal.parent, nodes.reference | nodes.title | pending_xref):
                continue
            name = re.sub(r"^pv\.", "pyro_vae.", found.group())
            if name.startswith("pyro_vae.") or name in listed:
                link = pending_xref("", refdomain="py", reftype="obj", reftarget=name, refdoc=self.env.docname)
                literal.replace_self(link)
                link += literal


class IndexQuestions(SphinxTransform):
    """Makes an entry of the index of each phrase in a heading of the FAQ: search finds these first."""

    default_priority = 501

    def apply(self, **kwargs: Any) -> None:
        """Change the page."""
        if self.env.docname != "faq":
            return
        for section in list(self.document.findall(nodes.section)):
            phrases = section[0].astext().split(", ")
            section.insert(1, index(entries=[("single", each, section["ids"][0], "main", None) for each in phrases]))


def setup(app: Any) -> dict[str, bool]:
    """When a page has been read."""
    app.add_transform(LinkNames)
    app.add_transform(IndexQuestions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
