"""The links of a Markdown file to other files and to headings, and which of them lead nowhere."""

import re
from pathlib import Path
from urllib.parse import unquote

FENCE = re.compile(r"^```.*?^```[ \t]*$", re.DOTALL | re.MULTILINE)
INLINE_CODE = re.compile(r"`(?:[^`\n]|\n(?!\s*\n))*`")
HEADING = re.compile(r"^#{1,6} +(.+?)[ #]*$", re.MULTILINE)
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s]+)\)")
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a file: lower case, hyphens for spaces, no punctuation."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        shown = LINK.sub(r"\1", heading).lower()
        name = anchor = re.sub(r"[^\w -]", "", shown).replace(" ", "-")
        number = 0
        while anchor in found:
            number += 1
            anchor = f"{name}-{number}"
        found.add(anchor)
    return found


def relative_links(text: str) -> list[tuple[str, str]]:
    """(text, target) of each link and figure that is not an address elsewhere. What stands in code is no link."""
    prose = INLINE_CODE.sub("", FENCE.sub("", text))
    return [(shown, target) for shown, target in LINK.findall(prose) if not ELSEWHERE.match(target)]


def broken_links(path: Path) -> list[str]:
    """The targets in a file that lead to no file, or to no heading of a Markdown file."""
    broken = []
    for _, target in relative_links(path.read_text()):
        file, _, anchor = target.partition("#")
        there = path.parent / unquote(file) if file else path
        if not there.exists():
            broken.append(target)
        elif anchor and (there.suffix != ".md" or anchor not in anchors(there.read_text())):
            broken.append(target)
    return broken
