"""What the documents point at is there."""

import re

import pytest
from paths import ROOT

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    inside = [link for link in links if "://" not in link]
    assert inside and not [link for link in inside if not (ROOT / link).exists()]


def test_files_named_in_contributing_exist():
    """In backticks, with a folder; x stands for a name that is yet to come."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tab|tests|examples|csrc|kernels|bench)/[\w/.*-]+)`", text)
    real = [name for name in named if "x" not in re.split(r"[/._]", name)]
    assert len(real) >= 10 and not [name for name in real if not list(ROOT.glob(name))]
