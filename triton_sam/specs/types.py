"""What the table of families is made of.

Dimensions follow Triton's convention: ``-1`` is an axis of any length, and every model has
``max_batch_size: 0``, so the leading axis is written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import InvalidInputError

MANIFEST_FILE = "export.json"
"""Beside a model's file: where it came from, its hash, and those of the files that belong to it."""

DType = Literal["float32", "int64", "int32", "uint8", "bool", "string"]
Fit = Literal["stretch", "pad"]
Resize = Literal["float", "pillow8", "torch8"]


@dataclass(frozen=True)
class Tensor:
    """One input or output of a model.

    ``optional`` inputs have a default inside the graph; ``default`` is its shape and the value
    it is filled with. A default with ones in its last axes broadcasts. ``ours``: an optional
    input of our own exports, which a pair that others published lacks. ``omittable``: an input
    that may be left out of a request with no value in its place.
    """

    name: str
    dims: tuple[int, ...]
    dtype: DType = "float32"
    default: tuple[tuple[int, ...], float] | None = None
    ours: bool = False
    omittable: bool = False

    @property
    def optional(self) -> bool:
        return self.omittable or self.default is not None


@dataclass(frozen=True)
class Model:
    """One Triton model: its name, its tensors in the order of the graph, and its file.

    Weights that do not fit into an ONNX file lie beside it, in ``data_file``.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    file: str = "model.onnx"

    @property
    def data_file(self) -> str:
        return f"{self.file}_data"

    def without_ours(self) -> Model:
        """The model as others publish it, without the inputs that our exports add."""
        return replace(self, inputs=tuple(t for t in self.inputs if not t.ours))

    def input(self, name: str) -> Tensor:
        return next(tensor for tensor in self.inputs if tensor.name == name)

    def output(self, name: str) -> Tensor:
        return next(tensor for tensor in self.outputs if tensor.name == name)


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes the encoder's input.

    ``size``: side of the square input in pixels. ``fit``: ``stretch`` scales both axes to the
    square; ``pad`` scales the longest side and fills up at the right and the bottom with the
    mean colour. ``mean`` and ``std`` normalise RGB in [0, 1]: inside the graph of encoders whose
    input is in [0, 1] (``normalise_in_graph``), else by the client. ``resize``: of what the
    official predictor resizes, and with whose rounding: ``float``s, or 8-bit values with
    Pillow's weights (``pillow8``) or torchvision's (``torch8``).
    """

    size: int
    fit: Fit
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Resize
    normalise_in_graph: bool

    def scaled_size(self, original_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels of an image of ``original_size`` in the encoder's input.

        For ``pad`` this is segment_anything's ``ResizeLongestSide.get_preprocess_shape``, except
        that a side never gets 0 pixels long, on which the original fails.
        """
        if self.fit == "stretch":
            return self.size, self.size
        height, width = original_size
        scale = self.size * 1.0 / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


@dataclass(frozen=True)
class PromptLayout:
    """Which decoder inputs carry the prompts.

    ``boxes``: the input for boxes; ``None`` where a box travels as two points, its corners,
    labelled ``box_labels``, before the clicks. ``pad_label`` marks a point that is none.
    ``group_axis``: points, labels, masks and scores have an axis of length one after the first.
    ``mask_size``: side of the low-resolution logits, given back as ``mask``; ``mask_clip``: the
    official predictor clamps the logits that it returns, and so those that come back as a
    prompt, to ±this (``None``: it does not).
    """

    points: str
    labels: str
    boxes: str | None
    mask: str
    has_mask: str
    multimask: str
    group_axis: bool
    box_labels: tuple[int, int]
    pad_label: int
    mask_size: int
    mask_clip: float | None


@dataclass(frozen=True)
class HubFiles:
    """Files of a repository on the Hugging Face hub.

    ``gated``: they need a token, and the licence accepted on the repository's page.
    """

    repository: str
    files: tuple[str, ...]
    gated: bool = False
    revision: str = "main"


@dataclass(frozen=True)
class PublishedPair:
    """An ONNX pair that others publish on the hub under the family's own contract.

    ``encoder`` and ``decoder``: paths without suffix and ``.onnx``; beside each file lies its
    weights' file with ``_data`` at the end of its name. ``precisions``: suffix by precision.
    """

    repository: str
    encoder: str
    decoder: str
    precisions: Mapping[str, str]


@dataclass(frozen=True)
class Variant:
    """A checkpoint of a family.

    ``file``: its name in the folder of checkpoints. ``url``, with ``nbytes`` and ``sha256`` of
    the file there, or ``hub`` say where it comes from; neither, and it is not downloaded (the
    demo model). ``model_cfg`` is the name of the official configuration, or a file in
    ``triton_sam/export/configs``.
    """

    name: str
    file: str
    model_cfg: str
    url: str | None = None
    nbytes: int | None = None
    sha256: str | None = None
    hub: HubFiles | None = None


@dataclass(frozen=True)
class Family:
    """Everything that the rest of the package has to know about a model family."""

    name: str
    title: str
    image: ImageSpec
    encoder: Model
    decoder: Model
    prompts: PromptLayout
    masks: str
    scores: str
    variants: Mapping[str, Variant]
    default_variant: str
    published: PublishedPair | None = None
    served_variant: str = ""

    @property
    def models(self) -> tuple[Model, Model]:
        return self.encoder, self.decoder

    def variant(self, name: str | None = None) -> Variant:
        """The variant called ``name``, or the default one.

        Raises :class:`InvalidInputError` when there is none of that name.
        """
        try:
            return self.variants[name or self.default_variant]
        except KeyError:
            known = ", ".join(self.variants)
            raise InvalidInputError(
                f"{self.title} has no variant {name!r}; choose one of: {known}."
            ) from None

    def named(self, name: str | None = None) -> Family:
        """The family with the models of the variant ``name``, which lie beside the default's.

        The default variant's models are called ``sam2_encoder`` and so on, the others'
        ``sam2_large_encoder``. Raises :class:`InvalidInputError` for an unknown variant.
        """
        variant = self.variant(name)
        if variant.name == self.default_variant:
            return self
        prefix = f"{self.name}_{variant.name}"
        return replace(
            self,
            encoder=replace(self.encoder, name=f"{prefix}_encoder"),
            decoder=replace(self.decoder, name=f"{prefix}_decoder"),
            served_variant=variant.name,
        )
