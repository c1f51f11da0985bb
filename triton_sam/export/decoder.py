"""What the traced decoders of SAM 1 and SAM 2 have in common.

Their prompt encoders are the same module; the official code branches in Python on which prompts
there are, where these compute with what came.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..specs import Family
from .split import Attention, Layer, Parts

# By input. Two prompts of three points: an axis of length one would be traced as a broadcast.
_EXAMPLE_SHAPES = {
    "image_embeddings": (2, 256, 64, 64),
    "point_coords": (2, 3, 2),
    "point_labels": (2, 3),
    "mask_input": (2, 1, 256, 256),
    "has_mask_input": (2,),
    "multimask_output": (1,),
    "high_res_feats_0": (2, 32, 256, 256),
    "high_res_feats_1": (2, 64, 128, 128),
}


def examples(family: Family) -> tuple[Tensor, ...]:
    """One tensor for each input of the family's decoder, to trace it with."""
    return tuple(torch.ones(_EXAMPLE_SHAPES[tensor.name]) for tensor in family.decoder.inputs)


class PromptDecoder(nn.Module):
    """Prompts to embeddings, and masks to those that were asked for.

    ``prompt_encoder``: segment_anything's or sam2's ``PromptEncoder``.
    """

    prompt_encoder: Any
    mask_decoder: Any

    def __init__(self, prompt_encoder: Any, mask_decoder: Any) -> None:
        super().__init__()
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder

    def embed_points(self, coords: Tensor, labels: Tensor) -> Tensor:
        """Points (N, P, 2) in the encoder's frame, labelled (N, P), as N x P x C."""
        size = self.prompt_encoder.input_image_size[0]
        embedding = self.prompt_encoder.pe_layer._pe_encoding((coords + 0.5) / size)
        labels = labels.unsqueeze(-1)
        is_point = (labels != -1).to(embedding.dtype)
        embedding = embedding * is_point + self.prompt_encoder.not_a_point_embed.weight * (
            1 - is_point
        )
        for label, learned in enumerate(self.prompt_encoder.point_embeddings):
            embedding = embedding + learned.weight * (labels == label).to(embedding.dtype)
        return cast(Tensor, embedding)

    def embed_mask(self, mask: Tensor, has_mask: Tensor, coords: Tensor) -> Tensor:
        """The mask prompt, or what stands for none, as N x C x 64 x 64."""
        # One row a prompt, whatever the length of the two masks' leading axis.
        per_prompt = torch.zeros_like(coords[:, :1, :1]).sum(dim=1, keepdim=True)
        has_mask = has_mask.reshape(-1, 1, 1, 1) + per_prompt.unsqueeze(-1)
        return has_mask * self.downscale(mask) + (1 - has_mask) * self.no_mask()

    def downscale(self, mask: Tensor) -> Tensor:
        """Mask prompts (N, 1, 256, 256) as N x C x 64 x 64."""
        return cast(Tensor, self.prompt_encoder.mask_downscaling(mask))

    def no_mask(self) -> Tensor:
        """What stands for no mask prompt, 1 x C x 1 x 1."""
        return cast(Tensor, self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1))

    def places(self) -> Tensor:
        """The positional encoding of the embedding, 1 x C x 64 x 64.

        Computed in the graph: ONNX Runtime folds it at load, and the file is 4 MB smaller.
        """
        return cast(Tensor, self.prompt_encoder.get_dense_pe())

    def parts(self) -> Parts:
        """The mask decoder's modules; what SAM 2 has more comes from its own class."""
        decoder = self.mask_decoder
        transformer, upscaling = decoder.transformer, decoder.output_upscaling
        return Parts(
            tokens=(decoder.iou_token, decoder.mask_tokens),
            quality_token=0,
            layers=tuple(map(_layer, transformer.layers)),
            last=_attention(transformer.final_attn_token_to_image),
            last_norm=transformer.norm_final_attn,
            coarser=upscaling[0],
            norm=upscaling[1],
            finer=upscaling[3],
            hypernetworks=decoder.output_hypernetworks_mlps,
            quality=decoder.iou_prediction_head,
            presence=None,
        )

    def choose(self, masks: Tensor, scores: Tensor, multimask: Tensor) -> tuple[Tensor, Tensor]:
        """Mask 0 of the four, or with ``multimask`` masks 1 to 3."""
        flag = (multimask.reshape(()) > 0.5).to(torch.int64)
        index = torch.arange(4, device=masks.device)[flag : 1 + 3 * flag]
        return masks.index_select(1, index), scores.index_select(1, index)


def _attention(official: Any) -> Attention:
    projections = official.q_proj, official.k_proj, official.v_proj, official.out_proj
    return Attention(*projections, official.num_heads)


def _layer(official: Any) -> Layer:
    return Layer(
        among=_attention(official.self_attn),
        to_image=_attention(official.cross_attn_token_to_image),
        to_tokens=_attention(official.cross_attn_image_to_token),
        mlp=official.mlp,
        norms=(official.norm1, official.norm2, official.norm3, official.norm4),
    )


def with_padding_point(coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The points and one more that is none, as the official prompt encoder appends it."""
    coords = torch.cat([coords, torch.zeros_like(coords[:, :1])], dim=1)
    labels = torch.cat([labels, -torch.ones_like(labels[:, :1])], dim=1)
    return coords, labels
