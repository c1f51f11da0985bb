"""What the traced encoders that take an image in [0, 1] have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..specs import ImageSpec


class NormalisingEncoder(nn.Module):
    """Applies the mean and the standard deviation of ``image`` inside the graph."""

    mean: Tensor
    std: Tensor

    def __init__(self, image: ImageSpec) -> None:
        super().__init__()
        # In float32, so that what was padded with the mean becomes exactly zero.
        self.register_buffer("mean", torch.tensor(image.mean).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(image.std).reshape(1, 3, 1, 1))

    def normalise(self, image: Tensor) -> Tensor:
        """RGB in [0, 1], (B, 3, S, S), as the official model takes it."""
        return (image - self.mean) / self.std
