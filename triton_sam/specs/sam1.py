"""SAM 1: the longest side scaled and the rest padded, boxes as labelled points."""

from __future__ import annotations

from types import MappingProxyType

from .types import Family, ImageSpec, Model, PromptLayout, Tensor, Variant

_META = "https://dl.fbaipublicfiles.com/segment_anything/"


def _variant(name: str, suffix: str, nbytes: int, sha256: str) -> Variant:
    file = f"sam_{name}_{suffix}.pth"
    # model_cfg: the key in segment_anything.sam_model_registry.
    return Variant(name, file, model_cfg=name, url=_META + file, nbytes=nbytes, sha256=sha256)


# Checkpoint sizes: Content-Length of Meta's files. Meta publishes no checksums; these are the
# ones on which independent projects that pin them agree.
SAM1 = Family(
    name="sam1",
    title="SAM 1",
    # segment_anything.modeling.Sam.pixel_mean and pixel_std, which are on 0 to 255;
    # segment_anything.utils.transforms.ResizeLongestSide resizes 8-bit PIL images.
    image=ImageSpec(
        size=1024,
        fit="pad",
        mean=(123.675 / 255, 116.28 / 255, 103.53 / 255),
        std=(58.395 / 255, 57.12 / 255, 57.375 / 255),
        resize="pillow8",
        normalise_in_graph=True,
    ),
    encoder=Model(
        name="sam1_encoder",
        inputs=(Tensor("image", (-1, 3, 1024, 1024)),),
        outputs=(Tensor("image_embeddings", (-1, 256, 64, 64)),),
    ),
    decoder=Model(
        name="sam1_decoder",
        inputs=(
            Tensor("image_embeddings", (-1, 256, 64, 64)),
            Tensor("point_coords", (-1, -1, 2)),
            Tensor("point_labels", (-1, -1)),
            Tensor("mask_input", (-1, 1, 256, 256), default=((1, 1, 256, 256), 0.0)),
            Tensor("has_mask_input", (-1,), default=((1,), 0.0)),
            Tensor("multimask_output", (1,), default=((1,), 0.0)),
        ),
        outputs=(
            Tensor("masks", (-1, -1, 256, 256)),
            Tensor("iou_predictions", (-1, -1)),
        ),
    ),
    prompts=PromptLayout(
        points="point_coords",
        labels="point_labels",
        boxes=None,
        mask="mask_input",
        has_mask="has_mask_input",
        multimask="multimask_output",
        group_axis=False,
        box_labels=(2, 3),
        pad_label=-1,
        mask_size=256,
        mask_clip=None,
    ),
    masks="masks",
    scores="iou_predictions",
    variants=MappingProxyType(
        {
            "vit_h": _variant(
                "vit_h",
                "4b8939",
                2_564_550_879,
                "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
            ),
            "vit_l": _variant(
                "vit_l",
                "0b3195",
                1_249_524_607,
                "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
            ),
            "vit_b": _variant(
                "vit_b",
                "01ec64",
                375_042_383,
                "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
            ),
        }
    ),
    default_variant="vit_h",
)
