"""What the documents point at is there, and README stays a first screen and not a manual."""

import re
import tomllib

import pytest
from documents import DOCUMENTS, PAGES, anchors, links, name_of, text_of
from paths import ROOT

README = ROOT / "README.md"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    dead = []
    for target, anchor in links(path):
        file = path.parent / target if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(f"{target}#{anchor}")
    assert not dead


def test_an_anchor_is_what_a_forge_makes_of_a_heading(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` [c](d.md), e\n\n```sh\n# no heading\n```\n\n## Ö: f_g\n")
    assert anchors(page) == {"a-b-c-e", "ö-f_g"}
    page.write_text("[a](#b) [c](d.md#e) [f](g.md) ![h](i.png) [j](https://k/l)\n")
    assert links(page) == [("", "b"), ("d.md", "e"), ("g.md", ""), ("i.png", "")]


def test_files_named_in_contributing_exist():
    """In backticks, with a folder; x stands for a name that is yet to come."""
    named = re.findall(
        r"`((?:tab|tests|examples|csrc|kernels|bench)/[\w/.*-]+)`",
        text_of(ROOT / "CONTRIBUTING.md"),
    )
    real = [name for name in named if "x" not in re.split(r"[/._]", name)]
    assert len(real) >= 10 and not [name for name in real if not list(ROOT.glob(name))]


def test_the_table_of_extras_is_whole():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table = text_of(ROOT / "docs" / "install.md").split("## Extras")[1].split("\n## ")[0]
    named = [name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in row.split(", ")]
    assert sorted(named) == sorted(f"`{name}`" for name in project["optional-dependencies"])


def test_readme_is_short():
    lines = text_of(README).splitlines()
    assert len(lines) <= 130 and not [line for line in lines if len(line) > 110]


def test_the_first_screen_says_what_it_is_and_how_to_begin():
    """And whose study it grew from, in the first paragraph."""
    first = text_of(README).split("\n\n")
    assert "Mello" in first[1] and "attention" in first[1]
    screen = "\n".join(text_of(README).splitlines()[:30])
    for wanted in ("make compare", "make test", "How fast?"):
        assert wanted in screen


def test_pictures_in_readme_are_small():
    pictures = [target for target, _ in links(README) if re.search(r"\.(png|svg)$", target)]
    assert pictures
    for target in pictures:
        assert (ROOT / target).stat().st_size < 200_000, target


def test_every_page_is_in_the_contents_of_the_site():
    """If this is red for a new page: name it under `nav` in mkdocs.yml, and in docs/index.md."""
    nav = re.search(r"^nav:\n(.*)", text_of(ROOT / "mkdocs.yml"), re.MULTILINE | re.DOTALL)
    listed = set(re.findall(r": (\S+\.md)$", nav[1], re.MULTILINE))
    assert listed == {path.name for path in PAGES} | {"CONTRIBUTING.md", "CHANGELOG.md"}
    index = {target for target, _ in links(ROOT / "docs" / "index.md")}
    assert {path.name for path in PAGES} - {"index.md"} <= index
