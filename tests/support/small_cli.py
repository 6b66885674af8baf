"""The command line in this process, and options that make a comparison small."""

import re

from typer.testing import CliRunner

from tab.cli.main import app

SMALL = [
    *("--recipe", "quick", "--data", "shapes:100/20", "--epochs", "1", "--device", "cpu"),
    *("--set", "data.images=60", "--set", "data.validation=20", "--set", "train.batch_size=20"),
    *("--set", "model.mlp.hidden=8", "--set", "model.mlp.tokens=4"),
    *("--set", "attention.multi_head.num_heads=2"),
]


def tab(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)
