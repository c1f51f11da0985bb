"""The demo model: the official SAM 2 model, a start from which it learns fast, its forward pass.

The official classes are used unchanged.  This module builds them from the demo configuration,
chooses initial values, and runs the parts that `SAM2ImagePredictor` runs, at any image size that
is a multiple of 256 (training at 256 px is sixteen times cheaper than at the 1024 px served).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_sam.export.sam2 import build_model
from triton_sam.specs import FAMILIES

PIXEL_MEAN, PIXEL_STD = FAMILIES["sam2"].image.mean, FAMILIES["sam2"].image.std
IMAGE_PATH = ("image_encoder.", "sam_prompt_encoder.", "sam_mask_decoder.", "no_mem_embed")
"""Prefixes of the parameters that still images use; all others belong to video tracking."""


def build(config: Path) -> Any:
    """The official model from a configuration file, as it is initialised, ready for training."""
    model: Any = build_model(str(config), None).train()
    for block in model.image_encoder.trunk.blocks:
        block.attn.forward = partial(_encoder_attention, block.attn)
    return model


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention, (N, heads, tokens, C).

    In bfloat16 PyTorch's own is slow on a CPU, above all backwards, unless there are many queries
    and many keys: between windows' 64 tokens plain products take a tenth of the time.
    """
    if q.dtype != torch.bfloat16 or min(q.shape[-2], k.shape[-2]) > 256:
        return F.scaled_dot_product_attention(q, k, v)
    weights: Tensor = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
    return weights @ v


def _encoder_attention(attention: Any, x: Tensor) -> Tensor:
    """``MultiScaleAttention.forward`` with `attend`."""
    b, h, w, _ = x.shape
    heads = attention.num_heads
    q, k, v = attention.qkv(x).view(b, h * w, 3, heads, -1).unbind(2)
    if attention.q_pool:
        q = attention.q_pool(q.reshape(b, h, w, -1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        h, w = q.shape[1:3]
        q = q.reshape(b, h * w, heads, -1)
    out = attend(*(t.transpose(1, 2) for t in (q, k, v)))
    return torch.as_tensor(attention.proj(out.transpose(1, 2).reshape(b, h, w, -1)))


def image_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take part in segmenting a still image."""
    return {n: p for n, p in model.named_parameters() if n.startswith(IMAGE_PATH)}


def _initialise_reader(attention: Any, gain: float, carry: float, generator: Any) -> None:
    """Make a cross-attention look where the query's position is and carry what it finds.

    Queries and keys keep the same sine/cosine pairs of the positional encoding, so their inner
    product is a function of the distance in the image with its peak at distance 0.  Values pass
    through a projection onto half of the channels and back, times ``carry``.
    """
    inner, channels = attention.q_proj.weight.shape
    frequencies = channels // 2
    chosen = torch.randperm(frequencies, generator=generator)[: inner // 2]
    per_head = inner // 2 // attention.num_heads
    select = torch.zeros(inner, channels)
    for i, frequency in enumerate(chosen.tolist()):
        head, slot = divmod(i, per_head)
        row = head * 2 * per_head + 2 * slot
        select[row, frequency] = gain
        select[row + 1, frequency + frequencies] = gain
    basis = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0][:inner]
    noise = 0.02 * torch.randn(2, inner, channels, generator=generator)
    attention.q_proj.weight.copy_(select + noise[0])
    attention.k_proj.weight.copy_(select + noise[1])
    attention.v_proj.weight.copy_(basis)
    attention.out_proj.weight.copy_(carry * basis.T)
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
        layer.bias.zero_()


@torch.no_grad()
def initialise(model: Any, seed: int) -> None:
    """Give the model starting values from which it finds its prompts at once.

    From the default values the decoder takes very long to discover that a click's positional
    encoding points at a place in the image.  Here that connection exists from the first step:
    positional frequencies span several scales, token embeddings are small beside the positional
    code, cross-attentions compare positions, and self-attentions hand the click to all tokens.
    """
    g = torch.Generator().manual_seed(seed)
    prompt, decoder = model.sam_prompt_encoder, model.sam_mask_decoder
    matrix = prompt.pe_layer.positional_encoding_gaussian_matrix
    scales = torch.logspace(-0.3, 0.6, matrix.shape[1], base=10.0)
    scales = scales[torch.randperm(len(scales), generator=g)]
    angles = torch.rand(matrix.shape[1], generator=g) * 2 * torch.pi
    matrix.copy_(scales * torch.stack([angles.cos(), angles.sin()]))
    for table in (decoder.mask_tokens, decoder.iou_token, decoder.obj_score_token):
        table.weight.copy_(0.1 * torch.randn(table.weight.shape, generator=g))
    for table in (*prompt.point_embeddings, prompt.not_a_point_embed):
        table.weight.copy_(0.15 * torch.randn(table.weight.shape, generator=g))
    prompt.no_mask_embed.weight.zero_()
    model.no_mem_embed.zero_()
    for layer in decoder.transformer.layers:
        _initialise_reader(layer.cross_attn_token_to_image, 2.0, 1.0, g)
        _initialise_reader(layer.cross_attn_image_to_token, 1.5, 0.3, g)
        _initialise_copier(layer.self_attn, g)
    _initialise_reader(decoder.transformer.final_attn_token_to_image, 2.0, 1.0, g)
    for mlp in decoder.output_hypernetworks_mlps:
        for linear in mlp.layers:
            nn.init.orthogonal_(linear.weight, gain=1.4, generator=g)
            linear.bias.zero_()
    trunk = model.image_encoder.trunk
    nn.init.trunc_normal_(trunk.pos_embed, std=0.1, generator=g)
    nn.init.trunc_normal_(trunk.pos_embed_window, std=0.02, generator=g)


def _initialise_copier(attention: Any, generator: Any) -> None:
    """Make a self-attention pass on the mean of all tokens unchanged."""
    size = attention.v_proj.weight.shape[0]
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    attention.v_proj.weight.copy_(basis)
    attention.out_proj.weight.copy_(basis.T)
    attention.v_proj.bias.zero_()
    attention.out_proj.bias.zero_()


@dataclass(frozen=True)
class Features:
    """An image batch as the decoder wants it.

    ``embedding`` (B, 256, S/16, S/16), ``fine`` (B, 32, S/4, S/4), ``middle`` (B, 64, S/8, S/8).
    """

    embedding: Tensor
    fine: Tensor
    middle: Tensor

    def repeat(self, count: int) -> Features:
        """Each image ``count`` times in a row, for as many prompts."""
        return Features(*(t.repeat_interleave(count, 0) for t in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three maps, coarse to fine order as declared."""
        return self.embedding, self.fine, self.middle


def normalise(images: Tensor) -> Tensor:
    """Map RGB in [0, 1], shape (B, 3, S, S), to what the encoder expects."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (images - mean) / std


def _fused_lateral(x: Tensor, lateral: nn.Conv2d, reduce: nn.Conv2d) -> Tensor:
    """``reduce(lateral(x))`` for two 1x1 convolutions, without the wide map between them."""
    assert lateral.bias is not None and reduce.bias is not None
    outer = reduce.weight[:, :, 0, 0]
    weight = outer @ lateral.weight[:, :, 0, 0]
    return F.conv2d(x, weight[:, :, None, None], outer @ lateral.bias + reduce.bias)


def encode(model: Any, images: Tensor, half: bool = False) -> Features:
    """Run the image path on normalised images (B, 3, S, S), with ``half`` mostly in bfloat16.

    Equal to ``forward_image`` followed by what ``SAM2ImagePredictor.set_image`` does, but without
    the 256-channel fine maps and the sine encodings that still images do not use.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        maps = model.image_encoder.trunk(images)
    fine, middle, coarse, coarsest = (x.float() for x in maps)
    convs = [block.conv for block in model.image_encoder.neck.convs]
    embedding = convs[1](coarse)
    embedding = embedding + F.interpolate(convs[0](coarsest), scale_factor=2.0, mode="nearest")
    decoder = model.sam_mask_decoder
    return Features(
        embedding + model.no_mem_embed.view(1, -1, 1, 1),
        _fused_lateral(fine, convs[3], decoder.conv_s0),
        _fused_lateral(middle, convs[2], decoder.conv_s1),
    )


def set_size(model: Any, size: int) -> None:
    """Tell the prompt encoder which image size (pixels) prompts refer to."""
    prompt = model.sam_prompt_encoder
    prompt.input_image_size = (size, size)
    prompt.image_embedding_size = (size // 16, size // 16)
    prompt.mask_input_size = (size // 4, size // 4)


@dataclass(frozen=True)
class Decoded:
    """The decoder's answer to N prompts.

    ``masks`` logits (N, 4, S/4, S/4): mask 0 answers clear prompts, 1-3 are alternatives;
    ``ious`` (N, 4) predicted quality; ``present`` (N, 1) logits that the object is there.
    """

    masks: Tensor
    ious: Tensor
    present: Tensor


def token_after_reading(model: Any, features: Features, cells: Tensor) -> Tensor:
    """What mask token 0 would bring to its hypernetwork if it read exactly one place.

    ``cells`` (B, K) are flat indices into the stride-16 grid.  The value at the cell passes the
    last cross-attention's projections; noise stands for whatever else the token carries.  The
    result (B, K, 32) are the weights of the pixel features.
    """
    decoder = model.sam_mask_decoder
    keys = decoder.transformer.layers[-1].norm4(features.embedding.flatten(2).transpose(1, 2))
    here = keys.gather(1, cells[..., None].expand(-1, -1, keys.shape[-1]))
    last = decoder.transformer.final_attn_token_to_image
    token = last.out_proj(last.v_proj(here)) + torch.randn_like(here)
    weights: Tensor = decoder.output_hypernetworks_mlps[0](
        decoder.transformer.norm_final_attn(token)
    )
    return weights


def drowned(features: Features) -> Tensor:
    """How far the embedding's size (root mean square per place) exceeds the positional code's.

    Keys are the sum of both.  Nothing else stops the embedding from growing until positions, and
    with them the prompts, can no longer be found.
    """
    size = features.embedding.square().mean(1).add(1e-6).sqrt()
    return F.relu(size - 0.7).square().mean()


def exported_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict to publish: every value representable in bfloat16, kept as float32.

    Two of four bytes are zero then, and the exported files compress to less than half. Matrices
    of the video path, which were never trained, become zero: they carry no information.
    """
    rounded = {}
    for name, value in state.items():
        keep = name.startswith(IMAGE_PATH) or value.ndim < 2
        rounded[name] = (value if keep else torch.zeros_like(value)).bfloat16().float()
    return rounded
