"""SAM 3's tracker: stretched to 1008 pixels, boxes as an input of their own, always three masks.

The contract is that of the published ``onnx-community/sam3-tracker-ONNX`` pair. Our own export
adds the inputs marked ``ours``.
"""

from __future__ import annotations

from types import MappingProxyType

from .types import (
    Family,
    HubFiles,
    ImageSpec,
    Model,
    PromptLayout,
    PublishedPair,
    Tensor,
    Variant,
)

_IMAGE_FEATURES = (
    Tensor("image_embeddings.0", (-1, 32, 288, 288)),
    Tensor("image_embeddings.1", (-1, 64, 144, 144)),
    Tensor("image_embeddings.2", (-1, 256, 72, 72)),
)

SAM3 = Family(
    name="sam3",
    title="SAM 3",
    # transformers' Sam3ImageProcessor: resize 8-bit values to 1008x1008, then to [-1, 1].
    image=ImageSpec(
        size=1008,
        fit="stretch",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        resize="torch8",
        normalise_in_graph=False,
    ),
    encoder=Model(
        name="sam3_encoder",
        inputs=(Tensor("pixel_values", (-1, 3, 1008, 1008)),),
        outputs=_IMAGE_FEATURES,
        file="vision_encoder.onnx",
    ),
    decoder=Model(
        name="sam3_decoder",
        inputs=(
            *_IMAGE_FEATURES,
            Tensor("input_points", (-1, 1, -1, 2)),
            Tensor("input_labels", (-1, 1, -1), "int64"),
            Tensor("input_boxes", (-1, -1, 4)),
            Tensor("input_masks", (-1, 1, 288, 288), default=((1, 1, 288, 288), 0.0), ours=True),
            Tensor("has_input_masks", (-1,), default=((1,), 0.0), ours=True),
            Tensor("multimask_output", (1,), default=((1,), 1.0), ours=True),
        ),
        outputs=(
            Tensor("iou_scores", (-1, -1, 3)),
            Tensor("pred_masks", (-1, -1, 3, 288, 288)),
            Tensor("object_score_logits", (-1, -1, 1)),
        ),
        file="prompt_encoder_mask_decoder.onnx",
    ),
    prompts=PromptLayout(
        points="input_points",
        labels="input_labels",
        boxes="input_boxes",
        mask="input_masks",
        has_mask="has_input_masks",
        multimask="multimask_output",
        group_axis=True,
        box_labels=(2, 3),
        pad_label=-1,
        mask_size=288,
        mask_clip=None,
    ),
    masks="pred_masks",
    scores="iou_scores",
    variants=MappingProxyType(
        {
            # A folder as `save_pretrained` writes it.
            "tracker": Variant(
                name="tracker",
                file="sam3",
                model_cfg="facebook/sam3",
                hub=HubFiles("facebook/sam3", ("config.json", "model.safetensors"), gated=True),
            ),
        }
    ),
    default_variant="tracker",
    published=PublishedPair(
        repository="onnx-community/sam3-tracker-ONNX",
        encoder="onnx/vision_encoder",
        decoder="onnx/prompt_encoder_mask_decoder",
        # The suffix that each precision adds to both names.
        precisions=MappingProxyType(
            {
                "fp32": "",
                "fp16": "_fp16",
                "int8": "_int8",
                "quantized": "_quantized",
                "q4": "_q4",
                "q4f16": "_q4f16",
                "bnb4": "_bnb4",
                "uint8": "_uint8",
            }
        ),
    ),
)
