"""The table of model families: the one place that names tensors, sizes, checkpoints and variants.

The exporter, the config generator, the client and the benchmarks all read :data:`FAMILIES`.
A new family is one entry here and one export wrapper.

Dimensions follow Triton's convention: ``-1`` is an axis of any length, and every model has
``max_batch_size: 0``, so the leading axis is written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from .errors import InvalidInputError

DType = Literal["float32", "int64"]
Fit = Literal["stretch", "pad"]


@dataclass(frozen=True)
class Tensor:
    """One input or output of a model.

    ``optional`` inputs have a default inside the graph; ``default`` is its shape and the value
    it is filled with. A default with ones in its last axes broadcasts.
    """

    name: str
    dims: tuple[int, ...]
    dtype: DType = "float32"
    default: tuple[tuple[int, ...], float] | None = None

    @property
    def optional(self) -> bool:
        return self.default is not None


@dataclass(frozen=True)
class Model:
    """One Triton model: its name and its tensors, in the order of the graph."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def input(self, name: str) -> Tensor:
        return next(tensor for tensor in self.inputs if tensor.name == name)

    def output(self, name: str) -> Tensor:
        return next(tensor for tensor in self.outputs if tensor.name == name)


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes the encoder's input.

    ``size``: side of the square input in pixels. ``fit``: ``stretch`` scales both axes to the
    square. ``mean`` and ``std`` normalise RGB in [0, 1]; they are applied *inside* the graph of
    encoders whose input is in [0, 1].
    """

    size: int
    fit: Fit
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class PromptLayout:
    """Which decoder inputs carry the prompts.

    A box travels as two points, its corners, labelled ``box_labels``; they stand before the
    clicks. ``pad_label`` marks a point that is none. ``mask_size``: side of the low-resolution
    logits, given back as ``mask``. ``mask_clip``: the official predictor clamps the logits that
    it returns, and so those that come back as a prompt, to ±this.
    """

    points: str
    labels: str
    mask: str
    has_mask: str
    multimask: str
    box_labels: tuple[int, int]
    pad_label: int
    mask_size: int
    mask_clip: float


@dataclass(frozen=True)
class Variant:
    """A checkpoint of a family.

    ``url`` is ``None`` where the checkpoint is not downloaded (the demo model). ``sha256`` and
    ``nbytes`` describe the file at ``url``. ``model_cfg`` is the name of the official
    configuration, or a file in ``triton_sam/export/configs``.
    """

    name: str
    file: str
    model_cfg: str
    url: str | None = None
    nbytes: int | None = None
    sha256: str | None = None


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


def family(name: str) -> Family:
    """The family called ``name``. Raises :class:`InvalidInputError` when there is none."""
    try:
        return FAMILIES[name]
    except KeyError:
        raise InvalidInputError(
            f"Unknown model type {name!r}; choose one of: {', '.join(FAMILIES)}."
        ) from None


_META_SAM2 = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/"


def _sam2_variant(name: str, cfg: str, nbytes: int, sha256: str) -> Variant:
    file = f"sam2.1_hiera_{name}.pt"
    return Variant(
        name=name,
        file=file,
        model_cfg=f"configs/sam2.1/sam2.1_hiera_{cfg}.yaml",
        url=_META_SAM2 + file,
        nbytes=nbytes,
        sha256=sha256,
    )


_SAM2_IMAGE_FEATURES = (
    Tensor("image_embeddings", (-1, 256, 64, 64)),
    Tensor("high_res_feats_0", (-1, 32, 256, 256)),
    Tensor("high_res_feats_1", (-1, 64, 128, 128)),
)

# Checkpoint sizes: Content-Length of Meta's files. Meta publishes no checksums; these are the
# ones on which independent projects that pin them agree.
_SAM2 = Family(
    name="sam2",
    title="SAM 2.1",
    # sam2.utils.transforms.SAM2Transforms: ToTensor, Resize((1024, 1024)), Normalize.
    image=ImageSpec(
        size=1024, fit="stretch", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
    encoder=Model(
        name="sam2_encoder",
        inputs=(Tensor("image", (-1, 3, 1024, 1024)),),
        outputs=_SAM2_IMAGE_FEATURES,
    ),
    decoder=Model(
        name="sam2_decoder",
        inputs=(
            Tensor("image_embeddings", (-1, 256, 64, 64)),
            Tensor("point_coords", (-1, -1, 2)),
            Tensor("point_labels", (-1, -1)),
            Tensor("mask_input", (-1, 1, 256, 256), default=((1, 1, 256, 256), 0.0)),
            Tensor("has_mask_input", (-1,), default=((1,), 0.0)),
            Tensor("multimask_output", (1,), default=((1,), 0.0)),
            # Broadcasting zeros: without these features the decoder adds nothing, which is
            # what clients that know only image_embeddings have always been given.
            Tensor("high_res_feats_0", (-1, 32, -1, -1), default=((1, 32, 1, 1), 0.0)),
            Tensor("high_res_feats_1", (-1, 64, -1, -1), default=((1, 64, 1, 1), 0.0)),
        ),
        outputs=(
            Tensor("masks", (-1, -1, 256, 256)),
            Tensor("iou_predictions", (-1, -1)),
            Tensor("object_score_logits", (-1, 1)),
        ),
    ),
    prompts=PromptLayout(
        points="point_coords",
        labels="point_labels",
        mask="mask_input",
        has_mask="has_mask_input",
        multimask="multimask_output",
        box_labels=(2, 3),
        pad_label=-1,
        mask_size=256,
        mask_clip=32.0,
    ),
    masks="masks",
    scores="iou_predictions",
    variants=MappingProxyType(
        {
            "tiny": _sam2_variant(
                "tiny",
                "t",
                156_008_466,
                "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
            ),
            "small": _sam2_variant(
                "small",
                "s",
                184_416_285,
                "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
            ),
            "base_plus": _sam2_variant(
                "base_plus",
                "b+",
                323_606_802,
                "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
            ),
            "large": _sam2_variant(
                "large",
                "l",
                898_083_611,
                "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
            ),
            # Ours, trained on synthetic scenes (docs/demo-model.md); it comes with the project.
            "demo": Variant(name="demo", file="sam2.1_demo.pt", model_cfg="sam2.1_demo.yaml"),
        }
    ),
    default_variant="tiny",
)

FAMILIES: Mapping[str, Family] = MappingProxyType({_SAM2.name: _SAM2})
