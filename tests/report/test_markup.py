"""Names of mechanisms, classes and data are read as they are written: none is markup."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from small_report import FACTS, run

from tab.cli.answer import pairs
from tab.cli.tables import ranked_table
from tab.cli.terminal import console
from tab.compare.plan import Grid
from tab.drawing.page import CHARTS
from tab.layers import Attention, register_attention
from tab.report import markdown, pictures, style
from tab.report.chart_data import Group, charts, looks
from tab.report.forest import forest_group, forest_picture
from tab.report.html import html_page
from tab.report.tables import markdown_lines, ranking
from tab.report.text import code, plain

NASTY = [
    *("$x$", "a|b", "<b>", "</script><script>alert(1)</script>", "_x_", "`y`", "a[/b]", "[red]"),
    *("**bold**", "a\\b", "~~gone~~", "[z](http://a.b)", "![z](x)", "&amp;", "$\\frac{", "``", "`"),
    *("<!-- x", "a_b_c", "# x", "$"),
]
MD = MarkdownIt("commonmark", {"html": False}).enable("table").enable("strikethrough")


class Words(HTMLParser):
    """The text of a page, and the elements that are in it."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.tags = "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", NASTY)
def test_markdown_shows_the_name(name):
    for made in (plain(name), code(name)):
        found = Words(MD.renderInline(f"see {made} there"))
        assert found.text == f"see {name} there" and set(found.tags) <= {"code"}
    table = Words(MD.render(markdown_lines(["Attention", "p"], [[name, "< 0.001"], ["x", name]])))
    assert [x for x in table.text.split("\n") if x] == [
        "Attention",
        "p",
        name,
        "< 0.001",
        "x",
        name,
    ]
    assert not set(table.tags) & {"em", "strong", "code", "s", "a", "img", "b", "script"}


def test_what_is_no_markup_stays():
    assert plain("multi_head at 3 < 4 & 5, 12.5 ± 0.1 (a–b)") == (
        "multi_head at 3 < 4 & 5, 12.5 ± 0.1 (a–b)"
    )
    assert plain("two\nlines\r\n") == "two lines" and code("a_b") == "`a_b`"


def report_of(names):
    runs = [run("none"), *(run(name, 0.4 + i / 100) for i, name in enumerate(names))]
    runs.append(run("self", status="failed"))
    facts = FACTS | {"dataset": {"name": names[0], "note": " ".join(names), "fingerprint": "0",
                                 "train": 1, "test": 1, "classes": 2},
                     "command": f"tab compare --data {names[0]}", "overrides": {}}  # fmt: skip
    grid = Grid(names[0], ["cnn"], ["none", *names], 1, "shapes", "cpu")
    return runs, markdown.report(runs, facts, grid, {"a": names[0]})


@pytest.mark.parametrize("name", NASTY)
def test_report_and_page_show_the_name(name, tmp_path):
    runs, text = report_of([name])
    shown = Words(MD.render(text))
    assert shown.text.count(name) >= 5
    before = Words(MD.render(report_of(["plain"])[1]))
    assert shown.tags == before.tags  # the same elements as with a name that is none
    group = Group("Charts", "note", charts(runs, runs, "test", {}))
    groups = [forest_group({"cnn": ranking(runs, "cnn")}), group]
    page = html_page(text, looks(["none", name]), groups, {}, None)
    found = Words(page)
    assert found.text.count(name) >= 5 and found.tags.count("script") == 2 + len(CHARTS)
    data = re.search('id="data">(.*?)</script>', page, re.S).group(1)
    assert "<" not in data


@pytest.mark.parametrize("name", NASTY)
def test_pictures_draw_the_name(name, tmp_path, monkeypatch):
    runs = [run("none"), run(name, 0.6)]
    seen = []
    real = style.Picture.savefig
    monkeypatch.setattr(
        style.Picture,
        "savefig",
        lambda self, *a, **k: (seen.extend(_texts(self)), real(self, *a, **k))[1],
    )
    pictures.per_epoch(tmp_path / "a.png", runs, "train_loss", f"loss {name}", name)
    pictures.bars(tmp_path / "b.png", ranking(runs, "cnn"), name)
    forest_picture(tmp_path / "c.png", name, ranking(runs, "cnn"))
    mine = [text for text in seen if name in text.get_text()]
    assert len(mine) >= 6 and not any(text.get_parse_math() for text in mine)
    assert (tmp_path / "a.png").is_file() and (tmp_path / "b.png").is_file()


def _texts(fig):
    fig.canvas.draw()
    return [text for text in fig.findobj(style.matplotlib.text.Text) if text.get_text()]


@pytest.mark.parametrize("name", NASTY)
def test_the_terminal_prints_the_name(name, monkeypatch, capsys):
    monkeypatch.setattr(console, "_width", 300)
    console.print(name)
    console.print(ranked_table(ranking([run("none"), run(name, 0.6)], "cnn"), name))
    console.print(pairs(name, [(name, name)]))
    # By itself, over a table and in it, and in the last three times.
    assert capsys.readouterr().out.count(name) >= 6


def test_every_picture_is_inside_the_context_that_draws_names_as_they_are():
    """No module of the report makes figures but by style.figure."""
    folder = Path(style.__file__).parent
    sources = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    assert [name for name, text in sources.items() if "Picture(" in text] == ["style.py"]
    assert not [name for name, text in sources.items() if "pyplot" in text or "Figure(" in text]


@pytest.mark.parametrize(
    "name", ["a/b", "../x", "a\\b", "a,b", "", " a", "a\nb", "-a", ".a", "all"]
)
def test_a_name_that_can_name_no_directory_is_refused(name):
    with pytest.raises(ValueError, match="directories and lists are named by it"):
        register_attention(name)(type("Named", (Attention,), {}))
