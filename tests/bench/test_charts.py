"""Pictures of a benchmark: bars over the best rival, memory, and the history over commits."""

import json
import re

import matplotlib.image
import pytest
from typer.testing import CliRunner

from tab.bench import page
from tab.bench.charts import OURS, THEIRS, charts, memory, picture, speeds
from tab.bench.history import history
from tab.bench.results import save
from tab.bench.rows import Row
from tab.cli.bench import app

ENVIRONMENT = {"cpu": "Z80", "threads": 1, "isa": "AVX2", "commit": "aaa"}


def row(contestant, seconds, case="linear/vision/full/float32", direction="both", **more) -> Row:
    made = Row(case, contestant, error=0.0, gradient_error=0.0, **more)
    made.timed(direction, seconds, [1.0] * len(seconds))
    return made


ROWS = [
    row("tab", [1.0, 1.0, 1.0]),
    row("eager", [8.0, 8.0, 16.0]),
    row("compile", [3.0, 4.0, 5.0]),
    Row("linear/vision/full/float32", "peer", skipped="not installed"),
]


def test_bars_are_times_as_fast_as_the_best_rival_in_the_same_rounds():
    (found,) = speeds(ROWS)
    assert found.rival == "compile" and "forward + backward" in found.title
    values = {bar.name: bar.value for bar in found.bars}
    assert values == {"tab": 4.0, "eager": 3 / 8, "compile": 1.0}  # medians of 3/8, 4/8 and 5/16
    assert [bar.ours for bar in found.bars] == [True, False, False]
    assert found.bars[0].low <= 4 <= found.bars[0].high and found.bars[2].low == 1


def test_a_loss_is_shown_as_a_loss():
    found = speeds([row("tab", [4.0, 4.0]), row("eager", [1.0, 1.0])])[0]
    assert found.bars[0].value == 0.25 and found.bars[1].value == 1


def test_what_has_no_rival_has_no_bars(tmp_path):
    assert speeds([row("tab", [1.0])]) == [] and charts([row("tab", [1.0])]) == []
    picture([row("tab", [1.0])], tmp_path / "a.png")
    assert not [*tmp_path.iterdir()]


def test_steps_are_held_against_their_own_twin():
    case = {"case": "steps/vit/n64/study/b8", "direction": "step"}
    rows = [row("none", [1.0] * 3, **case)]
    rows += [row("tab linear", [2.0] * 3, **case), row("eager linear", [3.0] * 3, **case)]
    rows += [row("tab self", [2.0] * 3, **case)]  # has no twin
    (found,) = speeds(rows)
    assert [(bar.name, bar.value) for bar in found.bars] == [("linear", 1.5)]


def test_memory_says_how_it_grows():
    rows = [
        Row(f"local/n{n}/full/float32", name, peak_bytes=size)
        for name, power in (("tab", 1), ("sdpa", 2))
        for n, size in ((1024, 10**6), (4096, 10**6 * 4**power))
    ]
    assert memory(rows) == {
        "local": {
            "tab, N^1.00": [(1024, 1.0), (4096, 4.0)],
            "sdpa, N^2.00": [(1024, 1), (4096, 16)],
        }
    }
    (chart,) = charts(rows)
    hues = [line["look"]["color"] for line in chart["series"]]
    assert hues == [OURS, THEIRS] and chart["xat"] == [1024, 4096]


def test_the_picture_is_drawn(tmp_path):
    picture(ROWS, tmp_path / "a.png")
    seen = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
    for colour in (OURS, THEIRS):
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(seen - rgb).max(-1) < 0.02).sum() > 500


def kept(folder, name, seconds, commit, **environment):
    facts = ENVIRONMENT | {"commit": commit} | environment
    save(folder / name, [row("tab", seconds), row("eager", [1.0] * 3)], None, facts, "tab bench")
    return folder / name


def test_history_is_relative_to_the_first_commit(tmp_path):
    paths = [kept(tmp_path, "a", [4.0] * 3, "aaa"), kept(tmp_path, "b", [2.0] * 3, "bbb")]
    (line,) = history(paths)
    assert [(p.commit, p.value) for p in line.points] == [("aaa", 1.0), ("bbb", 2.0)]
    done = CliRunner().invoke(app, ["history", *map(str, paths), "--out", str(tmp_path / "h.html")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "h.html").read_text()
    data = json.loads(re.search('id="data">(.*?)</script>', text, re.S).group(1))
    (chart,) = data["charts"]
    assert chart["xnames"] == ["aaa", "bbb"] and chart["series"][0]["y"] == [1.0, 2.0]


def test_a_busier_machine_is_no_slower_commit(tmp_path):
    """Both the kernel and the yardstick take twice as long."""
    paths = [kept(tmp_path, "a", [4.0] * 3, "aaa"), kept(tmp_path, "b", [8.0] * 3, "bbb")]
    record = json.loads(paths[1].read_text())
    record["rows"][0]["pace"] = {"both": [2.0] * 3}
    paths[1].write_text(json.dumps(record))
    assert [p.value for p in history(paths)[0].points] == [1.0, 1.0]


def test_what_makes_no_history_is_refused(tmp_path):
    a, b = kept(tmp_path, "a", [1.0] * 3, "aaa"), kept(tmp_path, "b", [1.0] * 3, "b", threads=2)
    with pytest.raises(ValueError, match="at least two"):
        history([a])
    with pytest.raises(ValueError, match="not of one machine"):
        history([a, b])
    assert history([a, b], force=True)
    record = json.loads(a.read_text())
    record["rows"][0]["pace"] = {}
    a.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="no yardstick"):
        history([a, a])


def test_the_page_shows_bars_before_the_table(tmp_path):
    record = {"command": "tab bench", "environment": {"torch": "2"}, "roofline": None}
    page.write_page(tmp_path / "x.html", record, ROWS)
    text = (tmp_path / "x.html").read_text()
    assert text.index("data-chart") < text.index("<table") and '"kind":"bars"' in text
