"""What MkDocs does not do by itself: links from docs/ to the rest of the repository, and the
certainty that a page, once it is there, asks no other machine for anything.

Read in the repository, they lead to the file. The site has no such file, so it comes along:
documents at the root become pages, any other file is copied below files/. A folder cannot be opened
on the site, and only the words of such a link remain.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # at the root, and pages of the site
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=\"?(https?://[^\s\">]+)")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    name = page.file.src_uri
    folder = ROOT if name in PAGES else (DOCS / name).parent

    def lead(link: re.Match) -> str:
        mark, text, target, anchor = link.groups()
        if "://" in target:
            return link[0]
        path = Path(os.path.normpath(folder / target))
        if path.is_dir():
            return text
        uri = place(path, config, files)
        return link[0] if uri is None else f"{mark}[{text}]({uri}{anchor or ''})"

    return LINK.sub(lead, markdown)


def place(path: Path, config, files) -> str | None:
    """Where the file is on the site, which it joins if it is not there yet; None if there is no
    such file, of which MkDocs then warns."""
    if path.parent == ROOT and path.name in PAGES:
        return path.name
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    if path.suffix == ".md":  # a report: its page is one file, its Markdown has pictures beside it
        path = path.with_suffix(".html")
    if not (path.is_file() and path.is_relative_to(ROOT)):
        return None
    uri = f"files/{path.relative_to(ROOT).as_posix()}"
    if files.get_file_from_path(uri) is None:
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return uri


def on_post_build(config):
    for page in Path(config.site_dir).rglob("*.html"):
        if found := FETCHED.findall(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page.name} would fetch {found[0]}: let the site bring it along")
