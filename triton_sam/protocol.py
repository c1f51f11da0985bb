"""What is said to the server and how its answers are read. No I/O: sync and async share it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import InferenceError, PromptError
from .images import to_encoder_frame
from .prompts import Prompt
from .specs import Family, ImageSpec, Model, PromptLayout, Tensor

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class Call:
    """One inference: the model, its inputs by name and the outputs to send back."""

    model: str
    inputs: Arrays
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Served:
    """The names of the inputs and outputs that a served model declares."""

    inputs: frozenset[str]
    outputs: frozenset[str]


@dataclass(frozen=True, eq=False)
class Embedding:
    """An encoded image: all that a decoder has to know about it.

    ``tensors``: the encoder's outputs by name, batch 1. ``original_size``: (height, width) in
    pixels. ``digest``: of the pixels. ``family``: the name in ``FAMILIES``.
    """

    tensors: Arrays
    original_size: tuple[int, int]
    digest: str
    family: str


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the decoder said: float32 ``logits`` (B, M, h, w), not clamped, ``scores`` (B, M)."""

    logits: NDArray[np.float32]
    scores: NDArray[np.float32]


def encode_call(family: Family, pixels: NDArray[np.float32], served: Served) -> Call:
    """Ask for the embedding of an image. ``pixels``: as :func:`~triton_sam.images.preprocess`.

    Older encoders have fewer outputs; only what the server declares is asked for.
    """
    model = family.encoder
    inputs = {model.inputs[0].name: pixels}
    _require(model, served.inputs, inputs)
    wanted = tuple(t.name for t in model.outputs if t.name in served.outputs)
    _require(model, wanted, _required_features(family))
    return Call(model.name, inputs, wanted)


def read_embedding(
    family: Family, call: Call, arrays: Arrays, original_size: tuple[int, int], digest: str
) -> Embedding:
    """The answer to :func:`encode_call`. Raises :class:`InferenceError` for another contract."""
    model = family.encoder
    tensors = {name: _checked(model, model.output(name), arrays) for name in call.outputs}
    return Embedding(tensors, original_size, digest, family.name)


def decode_call(family: Family, embedding: Embedding, prompt: Prompt, served: Served) -> Call:
    """Ask for the masks of B prompts in one image.

    Optional inputs travel only where they say something; features that an older decoder does not
    take stay behind. Raises :class:`PromptError` for a mask or ``multimask_output`` that it does
    not take.
    """
    model, layout = family.decoder, family.prompts
    prompts = _point_inputs(layout, family.image, prompt, embedding.original_size)
    options = _option_inputs(layout, prompt)
    features = {k: v for k, v in embedding.tensors.items() if k in served.inputs}
    _require(model, served.inputs, [*prompts, *_required_features(family)])
    _require_options(model, served, options)
    _require(model, served.outputs, (family.masks, family.scores))
    return Call(model.name, {**features, **prompts, **options}, (family.masks, family.scores))


def read_prediction(family: Family, arrays: Arrays, prompt: Prompt) -> Prediction:
    """The answer to :func:`decode_call`. Raises :class:`InferenceError` for another contract."""
    model = family.decoder
    logits = _checked(model, model.output(family.masks), arrays)
    scores = _checked(model, model.output(family.scores), arrays)
    if logits.shape[:2] != scores.shape or len(scores) != len(prompt.points):
        raise InferenceError(
            f"The model {model.name!r} answered {len(prompt.points)} prompts with masks of shape "
            f"{logits.shape} and scores of shape {scores.shape}."
        )
    return Prediction(logits, scores)


def _point_inputs(
    layout: PromptLayout, spec: ImageSpec, prompt: Prompt, original_size: tuple[int, int]
) -> dict[str, NDArray[np.float32]]:
    """Corners of boxes first, then clicks: the order of ``SAM2ImagePredictor._predict``."""
    coords, labels = prompt.points, prompt.labels
    if prompt.boxes is not None:
        corner_labels = np.tile(np.array(layout.box_labels, np.float32), (len(prompt.boxes), 1))
        coords = np.concatenate([prompt.boxes.reshape(-1, 2, 2), coords], axis=1)
        labels = np.concatenate([corner_labels, labels], axis=1)
    return {layout.points: to_encoder_frame(coords, original_size, spec), layout.labels: labels}


def _option_inputs(layout: PromptLayout, prompt: Prompt) -> dict[str, NDArray[np.float32]]:
    options: dict[str, NDArray[np.float32]] = {}
    if prompt.mask is not None:
        options[layout.mask] = prompt.mask
        options[layout.has_mask] = np.ones(len(prompt.mask), np.float32)
    if prompt.multimask:
        options[layout.multimask] = np.ones(1, np.float32)
    return options


def _required_features(family: Family) -> list[str]:
    """The encoder's outputs without which the decoder does not run."""
    needed = {tensor.name for tensor in family.decoder.inputs if not tensor.optional}
    return [tensor.name for tensor in family.encoder.outputs if tensor.name in needed]


def _require(model: Model, declared: Iterable[str], needed: Iterable[str]) -> None:
    missing = set(needed).difference(declared)
    if missing:
        raise InferenceError(
            f"The model {model.name!r} on this server has no tensor "
            f"{', '.join(map(repr, sorted(missing)))}; it declares "
            f"{', '.join(map(repr, sorted(declared)))}. Export it again with this version."
        )


def _require_options(model: Model, served: Served, options: Iterable[str]) -> None:
    missing = [name for name in options if name not in served.inputs]
    if missing:
        raise PromptError(
            f"The model {model.name!r} on this server is an older one that takes no "
            f"{missing[0]!r}: leave that prompt out, or export the model again."
        )


def _checked(model: Model, tensor: Tensor, arrays: Arrays) -> NDArray[np.float32]:
    """The output ``tensor``, after a look at its dtype and shape."""
    array = arrays.get(tensor.name)
    got = "nothing" if array is None else f"{array.dtype} of shape {array.shape}"
    if array is None or array.dtype != tensor.dtype or not _fits(array.shape, tensor.dims):
        raise InferenceError(
            f"The model {model.name!r} returned {got} as {tensor.name!r}; "
            f"expected {tensor.dtype} of shape {tensor.dims} (-1: any length)."
        )
    return array.astype(np.float32, copy=False)


def _fits(shape: tuple[int, ...], dims: tuple[int, ...]) -> bool:
    return len(shape) == len(dims) and all(
        want in (-1, have) for have, want in zip(shape, dims, strict=True)
    )
