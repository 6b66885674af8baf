"""Models and data so small that a training takes a second."""

import torch

from tab.compare.columns import MEASURED
from tab.data.load import Split

SMALL = {
    **{"model.mlp.hidden": 16, "model.mlp.tokens": 4, "model.cnn.hidden": 16},
    **{"model.mlp.match": "", "model.cnn.match": "", "model.cnn.channels": 4},
    **{"model.resnet9.match": "", "model.resnet9.hidden": 16, "model.resnet9.channels": 4},
    **{"train.batch_size": 32, "train.epochs": 3},
    **{"data.validation": 40, "evaluate.batch_size": 50},
}
TIMES = MEASURED  # what differs from one training to the same again


def split(count, seed):
    """Ten classes, each a colour and a bright row, under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    images = torch.randint(0, 100, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        images[i, 3 * label : 3 * label + 3] += 100
        images[i, :, :, label % 3] += 50
    return Split(images, labels)
