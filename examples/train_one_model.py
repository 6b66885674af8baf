"""One model with one attention, trained from Python and read back.

    python examples/train_one_model.py DIRECTORY

The command line does the same: tab train mlp performer --recipe quick --data shapes --out DIRECTORY
"""

import sys

import torch

import tab
from tab.data.load import load_dataset
from tab.recipe.recipe import load_recipe
from tab.train.loop import train

out = sys.argv[1]
dataset = load_dataset("shapes:1000/200")  # drawn pictures: 1000 to train on, 200 to test
config = load_recipe("quick", {"train.epochs": 2, "data.validation": 100}).run_config(
    "mlp", "performer", seed=0
)


def report(row: dict) -> None:
    print(f"epoch {row['epoch']}: loss {row['train_loss']:.3f}")


outcome = train(config, dataset, out, on_epoch=report)
print("test accuracy", outcome.summary["final_test_accuracy"])

model = tab.load_model(out)
with torch.no_grad():
    print("logits", tuple(model(torch.zeros(1, 3, 32, 32)).shape))
