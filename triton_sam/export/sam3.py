"""SAM 3's tracker: the two modules that are traced from the official model."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..specs import Family
from .sam3_official import build_model, predictor, save_checkpoint
from .split import Attention, Layer, Parts

__all__ = [
    "PACKAGES",
    "Decoder",
    "Encoder",
    "build_model",
    "modules",
    "predictor",
    "save_checkpoint",
]

PACKAGES: tuple[str, ...] = ("transformers", "safetensors")

# The most padding points that an official prompt has: see Decoder._append_padding.
_MAX_PADDING = 2


def modules(model: nn.Module, family: Family) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """What is traced: for each model of ``family`` the module and example inputs."""
    size = family.image.size
    # Two prompts of three points: an axis of length one would be traced as a broadcast.
    shapes = {
        "image_embeddings.0": (2, 32, 288, 288),
        "image_embeddings.1": (2, 64, 144, 144),
        "image_embeddings.2": (2, 256, 72, 72),
        "input_points": (2, 1, 3, 2),
        "input_labels": (2, 1, 3),
        "input_boxes": (2, 1, 4),
        "input_masks": (2, 1, 288, 288),
        "has_input_masks": (2,),
        "multimask_output": (1,),
    }
    examples = tuple(
        torch.ones(shapes[tensor.name], dtype=getattr(torch, tensor.dtype))
        for tensor in family.decoder.inputs
    )
    return {
        family.encoder.name: (Encoder(model), (torch.rand(1, 3, size, size),)),
        family.decoder.name: (Decoder(model), examples),
    }


class Encoder(nn.Module):
    """Pixels (B, 3, 1008, 1008), normalised, to ``Sam3TrackerModel.get_image_embeddings``."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.get_image_embeddings(pixel_values))


class Decoder(nn.Module):
    """Prompts and an embedding to mask logits, as ``Sam3TrackerModel.forward``.

    B prompts, each of P points and at most one box; the embedding has a leading axis of B, or of
    1 where all prompts are about one image. ``has_input_masks`` is 0 or 1 for each prompt or for
    all of them.

    Returns scores (B, 1, 3), logits (B, 1, 3, 288, 288) and object score logits (B, 1, 1). With
    ``multimask_output`` 1 they are masks 1 to 3; with 0 the first is the single mask that the
    official model returns, which is how three masks hold one.
    """

    model: Any
    mask_decoder: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # A copy that shares the weights and returns all four masks, the choice being ours.
        self.mask_decoder = copy.copy(cast(Any, model).mask_decoder)
        self.mask_decoder.dynamic_multimask_via_stability = True
        self.mask_decoder._dynamic_multimask_via_stability = _all_masks

    def forward(
        self,
        image_embeddings_0: Tensor,
        image_embeddings_1: Tensor,
        image_embeddings_2: Tensor,
        input_points: Tensor,
        input_labels: Tensor,
        input_boxes: Tensor,
        input_masks: Tensor,
        has_input_masks: Tensor,
        multimask_output: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sparse = self._embed_points(input_points, input_labels, input_boxes)
        # One row a prompt, whatever the length of the leading axis of embedding and masks.
        per_prompt = torch.zeros_like(sparse[:, :, :1, :1])
        masks, scores, _, object_scores = self.mask_decoder(
            image_embeddings=image_embeddings_2 + per_prompt,
            image_positional_embeddings=self.places(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=self._embed_mask(input_masks, has_input_masks, per_prompt),
            multimask_output=False,
            high_resolution_features=[image_embeddings_0, image_embeddings_1],
        )
        return (*self._choose(masks, scores, multimask_output), object_scores)

    def _embed_points(self, points: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """Points, then the box's corners as points labelled 2 and 3, then padding."""
        corners = boxes.reshape(boxes.shape[0], 1, -1, 2)
        # The corners' labels: 2, 3 where there is a box, nothing where there is none.
        corner_labels = torch.zeros_like(corners[..., 0], dtype=torch.int64)
        corner_labels = corner_labels + 1 + corner_labels.add(1).cumsum(-1)
        points = torch.cat([points, corners], dim=2)
        labels = torch.cat([labels, corner_labels], dim=2)
        points, labels = self._append_padding(points, labels)
        return cast(Tensor, self.model.prompt_encoder._embed_points(points, labels, pad=False))

    def _append_padding(self, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Officially one padding point, and a second one where there is nothing but a mask.

        ``Sam3TrackerModel.forward`` then makes up a padding point, to which its prompt encoder
        appends the one that every prompt gets.
        """
        both = torch.zeros_like(points[:, :, :1].sum(2, keepdim=True))
        both = both.expand(-1, -1, _MAX_PADDING, -1)
        count = 1 + (torch.zeros_like(labels[:1, 0]).add(1).sum() == 0).to(torch.int64)
        index = torch.arange(_MAX_PADDING, device=points.device)[:count]
        padding = both.index_select(2, index)
        padding_labels = torch.full_like(padding[..., 0], -1, dtype=torch.int64)
        return torch.cat([points, padding], dim=2), torch.cat([labels, padding_labels], dim=2)

    def _embed_mask(self, mask: Tensor, has_mask: Tensor, per_prompt: Tensor) -> Tensor:
        has_mask = has_mask.reshape(-1, 1, 1, 1) + per_prompt
        return has_mask * self.downscale(mask) + (1 - has_mask) * self.no_mask()

    def _choose(self, masks: Tensor, scores: Tensor, multimask: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and logits of masks 1 to 3, or of the single mask and of masks 1 and 2."""
        single, single_score = masks[:, :, :1], scores[:, :, :1]
        official = self.model.mask_decoder
        if official.dynamic_multimask_via_stability:
            single, single_score = official._dynamic_multimask_via_stability(masks, scores)
        flag = (multimask.reshape(()) > 0.5).to(torch.int64)
        index = torch.arange(3, device=masks.device) + flag
        return (
            torch.cat([single_score, scores[:, :, 1:]], dim=2).index_select(2, index),
            torch.cat([single, masks[:, :, 1:]], dim=2).index_select(2, index),
        )

    def embed_prompts(self, points: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """Points (B, 1, P, 2), labelled (B, 1, P), and boxes (B, 0 or 1, 4), as B x T x C."""
        return self._embed_points(points, labels, boxes).squeeze(1)

    def downscale(self, mask: Tensor) -> Tensor:
        """Mask prompts (B, 1, 288, 288) as B x C x 72 x 72."""
        return cast(Tensor, self.model.prompt_encoder.mask_embed(mask))

    def no_mask(self) -> Tensor:
        """What stands for no mask prompt, 1 x C x 1 x 1."""
        weight = self.model.prompt_encoder.no_mask_embed.weight
        return cast(Tensor, weight.reshape(1, -1, 1, 1))

    def places(self) -> Tensor:
        """The positional encoding of the embedding, 1 x C x 72 x 72.

        Computed in the graph: ONNX Runtime folds it at load, and the file is smaller.
        """
        return cast(Tensor, self.model.get_image_wide_positional_embeddings())

    def answer(self, masks: Tensor, scores: Tensor, multimask: Tensor) -> tuple[Tensor, Tensor]:
        """Of four masks (B, 4, h, w) the three that the decoder answers."""
        scores, masks = self._choose(masks.unsqueeze(1), scores.unsqueeze(1), multimask)
        return masks.squeeze(1), scores.squeeze(1)

    def parts(self) -> Parts:
        """The mask decoder's modules, for :mod:`.split`."""
        decoder = self.mask_decoder
        transformer = decoder.transformer
        return Parts(
            tokens=(decoder.obj_score_token, decoder.iou_token, decoder.mask_tokens),
            quality_token=1,
            layers=tuple(map(_layer, transformer.layers)),
            last=_attention(transformer.final_attn_token_to_image),
            last_norm=transformer.layer_norm_final_attn,
            coarser=decoder.upscale_conv1,
            norm=decoder.upscale_layer_norm,
            finer=decoder.upscale_conv2,
            hypernetworks=decoder.output_hypernetworks_mlps,
            quality=decoder.iou_prediction_head,
            presence=decoder.pred_obj_score_head,
        )


def _attention(official: Any) -> Attention:
    projections = official.q_proj, official.k_proj, official.v_proj, official.o_proj
    return Attention(*projections, official.num_attention_heads)


def _layer(official: Any) -> Layer:
    return Layer(
        among=_attention(official.self_attn),
        to_image=_attention(official.cross_attn_token_to_image),
        to_tokens=_attention(official.cross_attn_image_to_token),
        mlp=official.mlp,
        norms=(
            official.layer_norm1,
            official.layer_norm2,
            official.layer_norm3,
            official.layer_norm4,
        ),
    )


def _all_masks(masks: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    return masks, scores
