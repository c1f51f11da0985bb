"""What is said to the server and how its answers are read. No I/O: sync and async share it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .embedding import Embedding as Embedding
from .embedding import EmbeddingKey
from .errors import InferenceError, PromptError
from .images import to_encoder_frame
from .prompts import Prompt
from .shared_memory import Place
from .specs import Family, Model, PromptLayout, Tensor

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class Call:
    """One inference: the model, its inputs by name and the outputs to make.

    ``inputs_at``: further inputs, which lie in memory that the server shares. ``outputs_at``: where
    it is to put outputs there, which are not sent back then.
    """

    model: str
    inputs: Arrays
    outputs: tuple[str, ...]
    inputs_at: Mapping[str, Place] = field(default_factory=dict)
    outputs_at: Mapping[str, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """The names of the inputs and outputs that a served model declares."""

    inputs: frozenset[str]
    outputs: frozenset[str]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the decoder said: float32 ``logits`` (B, M, h, w), not clamped, ``scores`` (B, M)."""

    logits: NDArray[np.float32]
    scores: NDArray[np.float32]


class Encoded(Protocol):
    """An encoded image, wherever its tensors lie."""

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    @property
    def original_size(self) -> tuple[int, int]: ...


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
    family: Family, call: Call, arrays: Arrays, original_size: tuple[int, int], key: EmbeddingKey
) -> Embedding:
    """The answer to :func:`encode_call`. Raises :class:`InferenceError` for another contract."""
    model = family.encoder
    tensors = {name: _checked(model, model.output(name), arrays) for name in call.outputs}
    return Embedding(tensors, original_size, **asdict(key))


def decode_calls(
    family: Family,
    embedding: Encoded,
    prompt: Prompt,
    served: Served,
    further_outputs: tuple[str, ...] = (),
) -> list[Call]:
    """Ask for the masks of B prompts in one image: one call, or one for each prompt.

    Optional inputs travel only where they say something; features that an older decoder does not
    take stay behind. ``further_outputs`` are asked for beside masks and scores. A decoder that
    others exported is asked one prompt at a time: nothing says
    that one embedding serves several there. Raises :class:`PromptError` for a mask or
    ``multimask_output`` that the decoder does not take.
    """
    model, layout = family.decoder, family.prompts
    _require(model, served.outputs, (family.masks, family.scores))
    features = {k: v for k, v in embedding.tensors.items() if k in served.inputs}
    parts = prompt.split() if _is_foreign(family, served) else [prompt]
    calls = []
    for part in parts:
        prompts = _point_inputs(family, part, embedding.original_size)
        options = _mask_inputs(layout, part) | _multimask_input(family, part, served)
        _require(model, served.inputs, [*prompts, *_required_features(family)])
        _require_options(model, served, options)
        inputs = {**features, **prompts, **options}
        calls.append(Call(model.name, inputs, (family.masks, family.scores, *further_outputs)))
    return calls


def read_prediction(
    family: Family, answers: Sequence[Arrays], prompt: Prompt, served: Served
) -> Prediction:
    """The answers to :func:`decode_calls`. Raises :class:`InferenceError` for another contract.

    Where one mask is asked for and the decoder cannot choose, it is the one with the best score.
    """
    logits = read_output(family, family.masks, answers)
    scores = read_output(family, family.scores, answers)
    if logits.shape[:2] != scores.shape or len(scores) != len(prompt.points):
        raise InferenceError(
            f"The model {family.decoder.name!r} answered {len(prompt.points)} prompts with masks "
            f"of shape {logits.shape} and scores of shape {scores.shape}."
        )
    if prompt.multimask or scores.shape[1] == 1:
        return Prediction(logits, scores)
    # A decoder that always answers three masks puts the single one first, if it knows it.
    knows = family.prompts.multimask in served.inputs
    index = np.zeros((len(scores), 1), np.intp) if knows else scores.argmax(1)[:, None]
    return Prediction(
        np.take_along_axis(logits, index[:, :, None, None], 1),
        np.take_along_axis(scores, index, 1),
    )


def read_output(family: Family, output: str, answers: Sequence[Arrays]) -> NDArray[np.float32]:
    """One output of all calls, B first, without the axis of length one that some families have.

    Raises :class:`InferenceError` for another contract.
    """
    model = family.decoder
    parts = [_checked(model, model.output(output), arrays) for arrays in answers]
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return whole[:, 0] if family.prompts.group_axis else whole


def _is_foreign(family: Family, served: Served) -> bool:
    """Whether others exported this decoder: it lacks every input that our exports add."""
    ours = {tensor.name for tensor in family.decoder.inputs if tensor.ours}
    return bool(ours) and not ours & served.inputs


def _point_inputs(
    family: Family, prompt: Prompt, original_size: tuple[int, int]
) -> dict[str, NDArray[np.generic]]:
    """Boxes and clicks in the encoder's frame.

    Corners of boxes first, then clicks, where both are points: the order of
    ``SAM2ImagePredictor._predict``.
    """
    layout, spec = family.prompts, family.image
    coords, labels = prompt.points, prompt.labels
    inputs: dict[str, NDArray[np.generic]] = {}
    if layout.boxes is not None:
        corners = np.zeros((len(coords), 0, 2), np.float32)
        if prompt.boxes is not None:
            corners = prompt.boxes.reshape(-1, 2, 2)
        framed = to_encoder_frame(corners, original_size, spec)
        inputs[layout.boxes] = framed.reshape(len(coords), -1, 4)
    elif prompt.boxes is not None:
        corner_labels = np.tile(np.array(layout.box_labels, np.float32), (len(prompt.boxes), 1))
        coords = np.concatenate([prompt.boxes.reshape(-1, 2, 2), coords], axis=1)
        labels = np.concatenate([corner_labels, labels], axis=1)
    points = to_encoder_frame(coords, original_size, spec)
    labels = labels.astype(family.decoder.input(layout.labels).dtype)
    if layout.group_axis:
        points, labels = points[:, None], labels[:, None]
    return {layout.points: points, layout.labels: labels, **inputs}


def _mask_inputs(layout: PromptLayout, prompt: Prompt) -> dict[str, NDArray[np.generic]]:
    if prompt.mask is None:
        return {}
    return {layout.mask: prompt.mask, layout.has_mask: np.ones(len(prompt.mask), np.float32)}


def _multimask_input(
    family: Family, prompt: Prompt, served: Served
) -> dict[str, NDArray[np.generic]]:
    """The switch, where its default is not what is wanted.

    A decoder whose default is three masks may lack it: the best of them is then the single one.
    """
    name = family.prompts.multimask
    _, default = family.decoder.input(name).default or ((), 0.0)
    if prompt.multimask == bool(default) or (default and name not in served.inputs):
        return {}
    return {name: np.full(1, prompt.multimask, np.float32)}


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
            f"The model {model.name!r} on this server takes no {missing[0]!r}: leave that prompt "
            "out, or serve a model that `triton-sam export` of this version made."
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
