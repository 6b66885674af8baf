"""`tab bench decode`: who decodes wrongly is not timed, and what is shown of the others."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from tab.bench import decode, decoders
from tab.bench.decode import measure
from tab.bench.decode_chart import charts, curves, picture
from tab.bench.decoders import Decoder, Setting
from tab.bench.results import load
from tab.bench.rows import Row
from tab.cli.main import app

SMALL = Setting(200, batch=2, heads=4, kv_heads=4, width=16, window=128)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_everyone_decodes_right(dtype):
    rows = measure(replace(SMALL, dtype=dtype), budget=0.001, min_rounds=1)
    assert [row.contestant for row in rows] == decoders.names()
    assert not [(row.contestant, row.skipped) for row in rows if row.skipped]
    assert all(row.error < (1e-5 if dtype == torch.float32 else 0.1) for row in rows
               if row.contestant != "tab h2o")  # fmt: skip
    assert all(len(row.seconds["forward"]) == row.rounds["forward"][0] >= 1 for row in rows)


def test_the_bytes_are_those_of_the_formulas():
    held = {row.contestant: row.held_bytes for row in measure(SMALL, budget=0.001, min_rounds=1)}
    b, h, d, reserved = 2, 4, 16, 200 + decoders.ROOM
    assert held["tab kv"] == held["sdpa"] == 4 * b * h * reserved * 2 * d
    assert held["tab linear"] == held["recurrent linear"] == 4 * b * h * d * (d + 1)
    assert held["tab gated"] == held["recurrent gated"] == 4 * b * h * d * d
    assert held["tab performer"] == held["eager performer"] == 4 * b * h * 256 * (d + 2)
    assert held["tab local"] == held["eager local"] == 4 * b * h * 128 * 2 * d
    assert held["tab sparse"] == 4 * b * h * 128 * 2 * d
    assert held["tab mla"] == held["eager mla"] == 4 * b * reserved * (4 * d + d // 2)
    assert held["tab mla pages"] <= held["tab mla"]


def test_fewer_heads_of_k_and_v():
    """Who cannot do without his own heads says so; the others decode right."""
    rows = measure(replace(SMALL, kv_heads=2), budget=0.001, min_rounds=1)
    skipped = {row.contestant for row in rows if row.skipped}
    assert skipped == {one.name for one in decode.DECODERS if not one.grouped}
    assert all("as many heads" in row.skipped for row in rows if row.skipped)


def test_who_is_wrong_is_not_timed(monkeypatch):
    right = decode.DECODERS[0]

    def late(setting, prompt):
        step, size = right.begin(setting, prompt)
        return (lambda q, k, v: step(q, k, 0 * v)), size

    def broken(setting, prompt):
        raise RuntimeError("no such thing\nat all")

    wrong = Decoder("wrong", late, right.whole), Decoder("broken", broken, right.whole)
    monkeypatch.setattr(decode, "DECODERS", (right, *wrong))
    first, second, third = measure(SMALL, budget=0.001, min_rounds=1)
    assert first.seconds and not first.skipped and first.error < 1e-5
    assert second.skipped.startswith("wrong: error") and not second.seconds
    assert third.skipped == "RuntimeError: no such thing" and not third.seconds


def test_only_some():
    rows = measure(SMALL, budget=0.001, min_rounds=1, only=lambda name: "linear" in name)
    assert [row.contestant for row in rows] == ["tab linear", "recurrent linear", "eager linear"]


# --- what is shown --------------------------------------------------------------------------------


def row(n, seconds, name):
    case = Setting(n).name
    return Row(case, name, seconds={"forward": seconds}, held_bytes=1, batch=4, tokens=n)


def test_curves_are_tokens_a_second(tmp_path):
    rows = [
        row(4096, [0.5], "tab kv"),
        row(1024, [0.1, 0.2, 0.4], "tab kv"),
        row(1024, [1], "sdpa"),
    ]
    rows.append(Row(Setting(1024).name, "eager mla", skipped="wrong", held_bytes=1))
    (of,) = curves(rows).values()
    assert of == {"tab kv": [(1024, 20.0), (4096, 8.0)], "sdpa": [(1024, 4.0)]}
    (chart,) = charts(rows)
    assert [s["key"] for s in chart["series"]] == ["tab kv", "sdpa"] and chart["xat"] == [
        1024,
        4096,
    ]
    assert [bool(s["look"]["dash"]) for s in chart["series"]] == [False, True]
    picture(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
    picture(rows[-1:], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = "--lengths 64,128 --batch 1 --heads 2 --width 8 --window 128 --budget 0.001"
    line = ["bench", "decode", *given.split(), "--processes", "1", "--out", "d.json", "--json"]
    done = CliRunner().invoke(app, [*line, "--contestants", "tab linear,sdpa"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert {row["contestant"] for row in answer["results"]} == {"tab linear", "sdpa"}
    record, rows = load(tmp_path / "d.json")
    assert [r.tokens for r in rows] == [64, 64, 128, 128]
    assert record["command"] and record["environment"]["torch"] == torch.__version__
    page = (tmp_path / "d.html").read_text(encoding="utf-8")
    assert "tokens/s" in page and "cache MB" in page and "images/s" not in page
    assert (tmp_path / "d.png").exists()


@pytest.mark.parametrize(
    "given, words",
    (
        ("--lengths 64,x", "numbers of tokens"),
        ("--heads 8 --kv-heads 3", "--kv-heads divides --heads"),
        ("--window 200", "multiple of 64"),
        ("--contestants nobody", "choose from tab kv"),
        ("--dtype float8", "--dtype: unknown 'float8'; did you mean 'float32'? It takes: float32"),
    ),
)
def test_what_is_refused(given, words):
    done = CliRunner().invoke(app, ["bench", "decode", *given.split()])
    assert done.exit_code == 2 and words in " ".join(done.output.split())
