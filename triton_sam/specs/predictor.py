"""The predictor of a family: one model that keeps encoded images and answers prompts about them.

Its tensors are the same for every family but for the size of the low-resolution logits.
"""

from __future__ import annotations

from .types import Family, Model, Tensor


def predictor_model(family: Family) -> Model:
    """The predictor beside the pair of ``family``: ``sam2_predictor``, ``sam2_large_predictor``.

    Every input may be left out; coordinates are pixels of the original image, (x, y), as a person
    sees it. Only the outputs that are asked for are made.

    ==================  ========================================================================
    ``encoded_image``   an image file's bytes: JPEG, PNG, WebP, TIFF …
    ``image``           the pixels, HxWx3 RGB
    ``image_handle``    of an image that was sent before
    ``tenant_key``      a secret of the sender's: handles made under it can be found with it alone
    ``point_coords``    BxNx2, with ``point_labels`` BxN: 1 foreground, 0 background, -1 padding
    ``boxes``           Bx4, (x1, y1, x2, y2)
    ``mask_input``      (B or 1, 1, h, w) logits, as ``low_res_logits`` returned them
    ``mask_id``         (B or 1) in place of ``mask_input``: masks of this image that were answered
                        before, as in ``mask_ids``
    ``multimask_output``  three masks for each prompt instead of one
    ``priority``        0 a click (default), 1 a hover, 2 a prefetch
    ``deadline_ms``     milliseconds after which the answer is of no use
    ==================  ========================================================================

    ==================  ========================================================================
    ``found``           whether the handle is known; if not the other outputs are empty. Who does
                        not ask for it gets an error instead
    ``handle``          of the image, 32 hex digits
    ``mask_found``      whether every ``mask_id`` is known; if not, as with ``found``
    ``original_size``   (height, width)
    ``iou_predictions``  BxM, the IoU that the model expects
    ``low_res_logits``  BxMxhxw, not clamped
    ``low_res_bits``    BxMx(h·w/8): logits above 0, eight a byte, the first in the highest bit
    ``masks_rle``       BxM, COCO's compressed run lengths of the masks at the image's size
    ``masks_bits``      BxMx⌈H·W/8⌉: the same, eight a byte
    ``mask_ids``        BxM, 32 hex digits: what :func:`~triton_sam.predictor.masks.mask_name` makes
                        of the logits
    ``object_score_logits``  Bx1, where the family has it
    ==================  ========================================================================
    """
    side = family.prompts.mask_size
    scores = [Tensor(name, (-1, 1)) for name in further_outputs(family)]
    return Model(
        name=family.encoder.name.removesuffix("encoder") + "predictor",
        inputs=(
            Tensor("encoded_image", (1,), "string", omittable=True),
            Tensor("image", (-1, -1, 3), "uint8", omittable=True),
            Tensor("image_handle", (1,), "string", omittable=True),
            Tensor("tenant_key", (1,), "string", omittable=True),
            Tensor("point_coords", (-1, -1, 2), omittable=True),
            Tensor("point_labels", (-1, -1), omittable=True),
            Tensor("boxes", (-1, 4), omittable=True),
            Tensor("mask_input", (-1, 1, side, side), omittable=True),
            Tensor("mask_id", (-1,), "string", omittable=True),
            Tensor("multimask_output", (1,), "bool", omittable=True),
            Tensor("priority", (1,), "int32", omittable=True),
            Tensor("deadline_ms", (1,), "int32", omittable=True),
        ),
        outputs=(
            Tensor("found", (1,), "bool"),
            Tensor("mask_found", (1,), "bool"),
            Tensor("handle", (1,), "string"),
            Tensor("original_size", (2,), "int32"),
            Tensor("iou_predictions", (-1, -1)),
            Tensor("low_res_logits", (-1, -1, side, side)),
            Tensor("low_res_bits", (-1, -1, side * side // 8), "uint8"),
            Tensor("masks_rle", (-1, -1), "string"),
            Tensor("masks_bits", (-1, -1, -1), "uint8"),
            Tensor("mask_ids", (-1, -1), "string"),
            *scores,
        ),
        file="",
    )


def further_outputs(family: Family) -> tuple[str, ...]:
    """What the decoder says beside masks and scores."""
    known = (family.masks, family.scores)
    return tuple(tensor.name for tensor in family.decoder.outputs if tensor.name not in known)
