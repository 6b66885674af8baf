"""The documents, and what stands in them: fenced blocks, tables, links, anchors."""

import re
from pathlib import Path

from paths import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARKED = re.compile(r"<!-- not run:[^>]+-->\s*\Z")  # before a block that is only compiled


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    """For the names of tests."""
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, kind: str) -> list[str]:
    """The fenced blocks of one language."""
    return [body for name, body in FENCE.findall(text_of(path)) if name == kind]


def run_blocks(path: Path, kind: str) -> list[tuple[str, bool]]:
    """The same, and whether they are to be run."""
    text = text_of(path)
    found = [match for match in FENCE.finditer(text) if match[1] == kind]
    return [(match[2], not MARKED.search(text[: match.start()])) for match in found]


def links(path: Path) -> list[tuple[str, str]]:
    """(target, anchor) of each link within the repository."""
    found = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", FENCE.sub("", text_of(path)))
    return [(target, anchor) for target, anchor in found if "://" not in target]


def anchors(path: Path) -> set[str]:
    """Of the headings, as both a forge and the site make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(path)), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in plain}


def section(path: Path, heading: str) -> str:
    """The text below a heading, to the next one of any level."""
    _, found, rest = text_of(path).partition(f"\n{heading}\n")
    assert found, f"{name_of(path)} has no heading {heading}"
    return re.split(r"^#", FENCE.sub("", rest), maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all lines of its tables, but for the heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [
        [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
    ]
    rules = {i for i, line in enumerate(cells) if all(re.fullmatch(":?-+:?", c) for c in line)}
    return [line for i, line in enumerate(cells) if i not in rules and i + 1 not in rules]


def named(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)
