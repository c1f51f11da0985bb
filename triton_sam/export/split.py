"""The decoder in three graphs for the predictor, where a click computes only what is its own.

They say what the decoder says, with its sums in another order. What does not depend on the prompts
is done once an image. Positions stay rows from beginning to end, and upscaled ones lie in blocks
behind the position that they come from, so that transposed convolutions are matrix products and
nothing is moved until the masks are there. Where few tokens and many positions attend to each
other, the weights are multiplied with the tokens' side: for the eight tokens of a click half the
work of the official order, for more than about forty more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import onnx
import torch
from onnx.external_data_helper import set_external_data
from torch import Tensor, nn, unflatten
from torch.nn import functional

from ..specs import Family
from ..specs.predictor import further_outputs
from ..specs.split import split_decoder
from .onnx import trace

# Smaller ones are copied into each graph.
_SHARED_FROM_BYTES = 256


@dataclass(frozen=True)
class Attention:
    """An official attention module by the use of its projections."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    heads: int

    def among(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Few rows (N, T, C) that attend to few."""
        scores = self._asked(self.query, query) @ self.split(self.key(key)).transpose(2, 3)
        return self._gather(functional.softmax(scores, -1) @ self.split(self.value(value)))

    def to_image(self, query: Tensor, placed: Tensor, image: Tensor) -> Tensor:
        """Tokens (N, T, C) that attend to positions (N, P, C), with and without their places.

        The bias of the keys adds the same to all scores of a token, which changes no weight.
        """
        asked = self._asked(self.query, query) @ self._per_head(self.key)
        weights = functional.softmax(asked.flatten(1, 2) @ placed.transpose(1, 2), -1)
        found = unflatten(weights @ image, 1, (self.heads, -1))
        found = found @ self._per_head(self.value).transpose(1, 2)
        return self._gather(found + unflatten(self.value.bias, 0, (self.heads, 1, -1)))

    def to_known_image(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same with the keys (1 or N, heads, d, P) and values (…, P, d) of the positions."""
        return self._gather(functional.softmax(self._asked(self.query, query) @ keys, -1) @ values)

    def to_tokens(self, placed: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Positions (N, P, C) that attend to tokens (N, T, C)."""
        keys = self._asked(self.key, key)
        asked = (keys @ self._per_head(self.query)).flatten(1, 2)
        bias = (keys @ unflatten(self.query.bias, 0, (self.heads, -1, 1))).flatten(1)
        return self._find_tokens(placed @ asked.transpose(1, 2) + bias.unsqueeze(1), value)

    def to_tokens_from_known(self, queries: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same with the queries (1 or N, P, heads·d) of the positions."""
        # Each head's keys among zeros: one product for all heads.
        own = torch.eye(self.heads).reshape(1, self.heads, 1, self.heads, 1)
        keys = (self._asked(self.key, key).unsqueeze(3) * own).flatten(3).flatten(1, 2)
        return self._find_tokens(queries @ keys.transpose(1, 2), value)

    def split(self, rows: Tensor) -> Tensor:
        """Rows (N, T, heads·d) by head, (N, heads, T, d)."""
        return unflatten(rows, -1, (self.heads, -1)).transpose(1, 2)

    def _asked(self, projection: nn.Linear, rows: Tensor) -> Tensor:
        # One side of the scores carries the scale 1/sqrt(d).
        scale: float = (projection.out_features // self.heads) ** -0.5
        return self.split(projection(rows)) * scale

    def _per_head(self, projection: nn.Linear) -> Tensor:
        return unflatten(projection.weight, 0, (self.heads, -1))

    def _gather(self, found: Tensor) -> Tensor:
        return cast(Tensor, self.out(found.transpose(1, 2).flatten(2)))

    def _find_tokens(self, scores: Tensor, value: Tensor) -> Tensor:
        """``scores`` (N, P, heads·T) to what each position is told, (N, P, C)."""
        weights = functional.softmax(unflatten(scores, -1, (self.heads, -1)), -1).flatten(2)
        out = unflatten(self.out.weight, 1, (self.heads, -1)).permute(1, 2, 0)
        return weights @ (self.split(self.value(value)) @ out).flatten(1, 2) + self.out.bias


@dataclass(frozen=True)
class Layer:
    """A block of the two-way transformer; ``norms`` in the order in which they are applied."""

    among: Attention
    to_image: Attention
    to_tokens: Attention
    mlp: nn.Module
    norms: tuple[nn.Module, nn.Module, nn.Module, nn.Module]


@dataclass(frozen=True)
class Parts:
    """An official mask decoder by the use of its modules.

    ``tokens``: those that are learned, in order; the quality's is number ``quality_token``, and the
    masks' come after it. ``presence`` reads the first one.
    """

    tokens: tuple[nn.Embedding, ...]
    quality_token: int
    layers: tuple[Layer, ...]
    last: Attention
    last_norm: nn.Module
    coarser: nn.ConvTranspose2d
    norm: Any
    finer: nn.ConvTranspose2d
    hypernetworks: Sequence[nn.Module]
    quality: nn.Module
    presence: nn.Module | None


class Whole(Protocol):
    """What the family's traced decoder offers for being taken apart."""

    def parts(self) -> Parts: ...

    def embed_prompts(self, *prompts: Tensor) -> Tensor:
        """Points, labels and, where they are an input, boxes as N x T x C."""

    def downscale(self, mask: Tensor) -> Tensor:
        """Mask prompts as N x C x h x w."""

    def no_mask(self) -> Tensor:
        """What stands for no mask prompt, 1 x C x 1 x 1."""

    def places(self) -> Tensor:
        """The positional encoding of the embedding, 1 x C x h x w."""

    def answer(self, masks: Tensor, scores: Tensor, multimask: Tensor) -> tuple[Tensor, Tensor]:
        """Of masks (N, 4, h, w) and scores (N, 4) those that are asked for."""


class _Graph(nn.Module):
    """``whole`` is there twice: as the module whose weights are traced, and as what it offers."""

    def __init__(self, whole: nn.Module, family: Family) -> None:
        super().__init__()
        self.module = whole
        self.family = family

    @property
    def whole(self) -> Whole:
        return cast(Whole, self.module)

    def places(self) -> Tensor:
        return _rows(self.whole.places())

    def know(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the first layer makes of the positions (N, P, C) alone."""
        first = self.whole.parts().layers[0]
        placed = image + self.places()
        keys = first.to_image.split(first.to_image.key(placed)).transpose(2, 3)
        values = first.to_image.split(first.to_image.value(image))
        return keys, values, cast(Tensor, first.to_tokens.query(placed))


class Prepare(_Graph):
    """The encoder's outputs to what the predictor keeps of an image."""

    def forward(self, *outputs: Tensor) -> tuple[Tensor, ...]:
        tables = self.family.encoder.outputs
        by_channels = {t.dims[1]: output for t, output in zip(tables, outputs, strict=True)}
        image = _rows(by_channels[256] + self.whole.no_mask())
        kept = [image, *self.know(image)]
        side = self.family.prompts.mask_size // 4
        if 64 in by_channels:
            coarse = unflatten(unflatten(by_channels[64], 3, (side, 2)), 2, (side, 2))
            kept.append(coarse.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2))
        if 32 in by_channels:
            fine = unflatten(unflatten(by_channels[32], 3, (side, 2, 2)), 2, (side, 2, 2))
            fine = fine.permute(0, 2, 5, 3, 6, 4, 7, 1)
            kept.append(fine.flatten(5, 6).flatten(3, 4).flatten(1, 2))
        return tuple(kept)


class Mask(_Graph):
    """The rows of an image, and mask prompts, to what is kept of the image under them."""

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        change = self.whole.downscale(mask) - self.whole.no_mask()
        image = image + _rows(change)
        return image, *self.know(image)


class Click(_Graph):
    """What is kept of an image, and prompts, to the decoder's outputs."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        split = split_decoder(self.family)
        kept = dict(zip((t.name for t in split.kept), inputs, strict=False))
        *prompts, multimask = inputs[len(kept) :]
        parts = self.whole.parts()
        queries, image = self._attend(parts, kept, self.whole.embed_prompts(*prompts))
        first = parts.quality_token + 1
        nets = enumerate(parts.hypernetworks, first)
        hyper = torch.stack([net(queries[:, index]) for index, net in nets], dim=1)
        masks = self._upscale(parts, kept, image) @ hyper.transpose(1, 2)
        scores = parts.quality(queries[:, parts.quality_token])
        # Positions in one row, so that only the masks that are asked for are put into place.
        masks, scores = self.whole.answer(masks.transpose(1, 2).unsqueeze(3), scores, multimask)
        answers = {self.family.masks: self._in_place(masks), self.family.scores: scores}
        if parts.presence is not None:
            (name,) = further_outputs(self.family)
            answers[name] = parts.presence(queries[:, 0])
        ordered = [answers[tensor.name] for tensor in self.family.decoder.outputs]
        grouped = self.family.prompts.group_axis
        return tuple(answer.unsqueeze(1) if grouped else answer for answer in ordered)

    def _attend(
        self, parts: Parts, kept: dict[str, Tensor], sparse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens and positions after the transformer."""
        image, places = kept["image_rows"], self.places()
        learned = torch.cat([embedding.weight for embedding in parts.tokens])
        # One row a prompt.
        per_prompt = torch.zeros_like(sparse[:, :1, :1].sum(1, keepdim=True))
        tokens = torch.cat([learned + per_prompt, sparse], dim=1)
        queries, placed = tokens, image
        for number, layer in enumerate(parts.layers):
            after_self, after_image, after_mlp, after_tokens = layer.norms
            if number == 0:
                queries = after_self(layer.among.among(queries, queries, queries))
                found = layer.to_image.to_known_image(
                    queries + tokens, kept["image_keys"], kept["image_values"]
                )
            else:
                asking = queries + tokens
                queries = after_self(queries + layer.among.among(asking, asking, queries))
                found = layer.to_image.to_image(queries + tokens, placed, image)
            queries = after_image(queries + found)
            queries = after_mlp(queries + layer.mlp(queries))
            asked = queries + tokens
            if number == 0:
                told = layer.to_tokens.to_tokens_from_known(kept["image_queries"], asked, queries)
            else:
                told = layer.to_tokens.to_tokens(placed, asked, queries)
            image = after_tokens(image + told)
            placed = image + places
        found = parts.last.to_image(queries + tokens, placed, image)
        return parts.last_norm(queries + found), image

    def _upscale(self, parts: Parts, kept: dict[str, Tensor], image: Tensor) -> Tensor:
        """Positions (N, P, C) to sixteen each, (N, P·16, C/8)."""
        upscaled = _transposed_convolution(parts.coarser, image)
        if "coarse_blocks" in kept:
            upscaled = upscaled + kept["coarse_blocks"]
        norm = parts.norm
        shape = (parts.coarser.out_channels,)
        upscaled = functional.layer_norm(upscaled, shape, norm.weight, norm.bias, norm.eps)
        upscaled = _transposed_convolution(parts.finer, functional.gelu(upscaled))
        if "fine_blocks" in kept:
            upscaled = upscaled + kept["fine_blocks"]
        return functional.gelu(upscaled).flatten(1, 3)

    def _in_place(self, masks: Tensor) -> Tensor:
        """Masks (N, M, P·16, 1), in blocks of blocks, as N x M x h x w."""
        side = self.family.prompts.mask_size // 4
        blocks = unflatten(masks.flatten(2), 2, (side, side, 2, 2, 2, 2))
        return blocks.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(5, 7).flatten(2, 4)


def _rows(image: Tensor) -> Tensor:
    """N x C x h x w as N x (h·w) x C."""
    return image.flatten(2).transpose(1, 2)


def _transposed_convolution(convolution: nn.ConvTranspose2d, rows: Tensor) -> Tensor:
    """Of side 2 and stride 2: rows (…, C) to the four that each becomes, (…, 4, C')."""
    weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
    bias = cast(Tensor, convolution.bias)
    return unflatten(rows @ weight, -1, (4, convolution.out_channels)) + bias


def trace_split(
    whole: nn.Module, family: Family, examples: Sequence[Tensor], decoder: Path
) -> list[Path]:
    """Write the graphs of ``whole`` beside the decoder's file, which keeps their weights.

    ``whole``: the family's :class:`Whole`. ``examples``: those that the decoder was traced with, in
    the order of its inputs. Returns the files.
    """
    split = split_decoder(family)
    given = dict(zip((tensor.name for tensor in family.decoder.inputs), examples, strict=True))
    kinds = zip(split.graphs, (Prepare, Mask, Click), strict=True)
    files = []
    for model, kind in kinds:
        shapes = {tensor.name: (2, *tensor.dims[1:]) for tensor in model.inputs}
        inputs = [
            given[name] if name in given else torch.ones(shape) for name, shape in shapes.items()
        ]
        files.append(trace(kind(whole, family), model, tuple(inputs), decoder.parent))
        share_weights(files[-1], decoder)
    return files


def share_weights(graph: Path, decoder: Path) -> None:
    """Have ``graph`` read those of its weights that ``decoder`` holds from there.

    Both are ONNX files in one folder. What the decoder does not hold stays in the graph.
    """
    held = decoder.read_bytes()
    proto = onnx.load(str(graph))
    for weight in proto.graph.initializer:
        content = weight.raw_data
        offset = held.find(content) if len(content) >= _SHARED_FROM_BYTES else -1
        if offset >= 0:
            set_external_data(weight, decoder.name, offset, len(content))
            weight.ClearField("raw_data")
    onnx.save(proto, str(graph))
