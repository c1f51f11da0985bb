"""Names under which clients in the field ask for the encoders, and the tensors they expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Alias:
    """A model that is another's under a different name.

    ``family`` and ``variant``: whose encoder; the family's default one where that variant is not
    installed. ``outputs``: the encoder's output by the name that the client reads. ``jpeg``: it
    takes an image file's bytes as ``encoded_image`` in place of the encoder's own input.
    """

    name: str
    family: str
    outputs: Mapping[str, str]
    variant: str | None = None
    jpeg: bool = False


_SAM2_OUTPUTS = MappingProxyType(
    {
        "image_embed": "image_embeddings",
        "high_res_feats_0": "high_res_feats_0",
        "high_res_feats_1": "high_res_feats_1",
    }
)

ALIASES = (
    Alias("sam2.1_large_encoder", "sam2", _SAM2_OUTPUTS, variant="large"),
    Alias("sam2_encoder_jpeg", "sam2", _SAM2_OUTPUTS, jpeg=True),
    Alias(
        "sam3_tracker_encoder_fp16",
        "sam3",
        MappingProxyType({f"image_embeddings.{i}": f"image_embeddings.{i}" for i in range(3)}),
    ),
)
