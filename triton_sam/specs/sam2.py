"""SAM 2.1: stretched images, high-resolution features, boxes as labelled points."""

from __future__ import annotations

from types import MappingProxyType

from .types import Family, ImageSpec, Model, PromptLayout, Tensor, Variant

_META = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/"


def _variant(name: str, cfg: str, nbytes: int, sha256: str) -> Variant:
    file = f"sam2.1_hiera_{name}.pt"
    return Variant(
        name=name,
        file=file,
        model_cfg=f"configs/sam2.1/sam2.1_hiera_{cfg}.yaml",
        url=_META + file,
        nbytes=nbytes,
        sha256=sha256,
    )


_IMAGE_FEATURES = (
    Tensor("image_embeddings", (-1, 256, 64, 64)),
    Tensor("high_res_feats_0", (-1, 32, 256, 256)),
    Tensor("high_res_feats_1", (-1, 64, 128, 128)),
)

# Checkpoint sizes: Content-Length of Meta's files. Meta publishes no checksums; these are the
# ones on which independent projects that pin them agree.
SAM2 = Family(
    name="sam2",
    title="SAM 2.1",
    # sam2.utils.transforms.SAM2Transforms: ToTensor, Resize((1024, 1024)), Normalize.
    image=ImageSpec(
        size=1024,
        fit="stretch",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        resize="float",
        normalise_in_graph=True,
    ),
    encoder=Model(
        name="sam2_encoder",
        inputs=(Tensor("image", (-1, 3, 1024, 1024)),),
        outputs=_IMAGE_FEATURES,
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
        boxes=None,
        mask="mask_input",
        has_mask="has_mask_input",
        multimask="multimask_output",
        group_axis=False,
        box_labels=(2, 3),
        pad_label=-1,
        mask_size=256,
        mask_clip=32.0,
    ),
    masks="masks",
    scores="iou_predictions",
    variants=MappingProxyType(
        {
            "tiny": _variant(
                "tiny",
                "t",
                156_008_466,
                "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
            ),
            "small": _variant(
                "small",
                "s",
                184_416_285,
                "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
            ),
            "base_plus": _variant(
                "base_plus",
                "b+",
                323_606_802,
                "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
            ),
            "large": _variant(
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
