"""Image models around an attention layer."""

from .image_model import ImageModel, build_model

__all__ = ["ImageModel", "build_model"]
