"""Models of torch and timm whose attention is swapped, small and with nothing at zero."""

import timm
import torch
from torch import nn

N, C, HEADS = 16, 32, 4


def encoder(layers: int = 2, **options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    given = {"dropout": 0.0, "batch_first": True} | options
    layer = nn.TransformerEncoderLayer(C, HEADS, 64, **given)
    nested = given["batch_first"] and not given.get("norm_first")
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested)


def vit(**options) -> nn.Module:
    torch.manual_seed(0)
    given = {"img_size": 32, "patch_size": 8, "embed_dim": C, "depth": 2, "num_heads": HEADS}
    return timm.models.VisionTransformer(**{**given, "num_classes": 10, **options}).eval()


def randomised(model: nn.Module) -> nn.Module:
    """Biases, norms and all: zeros would hide what is not carried."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def padding() -> torch.Tensor:
    """(3, N) bool, True where a token is padding; entries of 16, 9 and 1 tokens."""
    return torch.arange(N) >= torch.tensor([[16], [9], [1]])
