"""A family's decoder in three graphs, which the predictor runs in place of the pair's one.

They lie beside the decoder's file, take their weights from it, and together say what it says:

============  =====================================================================================
``prepare``   once an image: the encoder's outputs to what the predictor keeps of it
``mask``      for a mask prompt: the part of that which the mask changes
``click``     prompts and what is kept to masks and scores
============  =====================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .types import Family, Model, Tensor

# Of the two-way transformer in segment_anything, sam2 and transformers' sam3_tracker alike:
# channels of an embedding, attention heads, and channels of all heads where an image takes part.
_CHANNELS, _HEADS, _INNER = 256, 8, 128


@dataclass(frozen=True)
class Split:
    """The three graphs. ``kept``: what the predictor keeps of an image, the mask's part first."""

    prepare: Model
    mask: Model
    click: Model
    kept: tuple[Tensor, ...]

    @property
    def graphs(self) -> tuple[Model, Model, Model]:
        return self.prepare, self.mask, self.click

    @property
    def changed(self) -> tuple[str, ...]:
        """Those of ``kept`` that a mask prompt changes, in the order of the outputs of ``mask``."""
        return tuple(tensor.name for tensor in self.kept[: len(self.mask.outputs)])


def split_decoder(family: Family) -> Split:
    """The graphs of ``family``.

    ==================  ========================================================================
    ``image_rows``      Bx(h·w)xC, the embedding with what stands for no mask, a row a position
    ``image_keys``      Bx8x16x(h·w), what the first layer's tokens attend to
    ``image_values``    Bx8x(h·w)x16, and what they find there
    ``image_queries``   Bx(h·w)x128, what the first layer's positions ask the tokens
    ``coarse_blocks``   Bx(h·w)x4x64, the features of twice the side, 2x2 of them at each position
    ``fine_blocks``     Bx(h·w)x4x4x32, of four times the side, 2x2 at each of those
    ==================  ========================================================================
    """
    decoder, layout = family.decoder, family.prompts
    features = {tensor.dims[1]: tensor for tensor in family.encoder.outputs}
    _, _, height, width = features[_CHANNELS].dims
    count, width = height * width, _INNER // _HEADS
    rows = Tensor("image_rows", (-1, count, _CHANNELS))
    placed = (
        Tensor("image_keys", (-1, _HEADS, width, count)),
        Tensor("image_values", (-1, _HEADS, count, width)),
        Tensor("image_queries", (-1, count, _INNER)),
    )
    blocks = [Tensor("coarse_blocks", (-1, count, 4, 64))] if 64 in features else []
    blocks += [Tensor("fine_blocks", (-1, count, 4, 4, 32))] if 32 in features else []
    kept = (rows, *placed, *blocks)
    masked = tuple(replace(tensor, name=f"masked_{tensor.name}") for tensor in kept[:4])
    given = {layout.points, layout.labels, layout.boxes, layout.multimask}
    prompts = tuple(tensor for tensor in decoder.inputs if tensor.name in given)
    mask = replace(decoder.input(layout.mask), default=None)
    name = decoder.name
    return Split(
        Model(name, family.encoder.outputs, kept, "prepare.onnx"),
        Model(name, (rows, mask), masked, "mask.onnx"),
        Model(name, (*kept, *prompts), decoder.outputs, "click.onnx"),
        kept,
    )
