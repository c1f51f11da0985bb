"""The official mask decoder's arithmetic, arranged for training on a CPU.

`decode` gives what ``MaskDecoder.predict_masks`` gives (a test in ``check`` compares them), with
the same parameters, but does once per image what does not depend on the prompt, and keeps channels
last so that up-scaling is two matrix products.  Serving uses the official code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo_model.network import Decoded, Features, attend


def _heads(x: Tensor, heads: int) -> Tensor:
    """(N, T, C) to (N, heads, T, C / heads)."""
    n, t, c = x.shape
    return x.view(n, t, heads, c // heads).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of projected queries (N, T, C) over keys and values (N, K, C)."""
    out = attend(_heads(q, heads), _heads(k, heads), _heads(v, heads))
    n, _, t, _ = out.shape
    return out.transpose(1, 2).reshape(n, t, -1)


def _read(attention: Any, tokens: Tensor, keys: Tensor, places: Tensor) -> Tensor:
    """Tokens (N, T, C) attend to image tokens keys (M, hw, C), M = N or one per image."""
    n, t, c = tokens.shape
    m = keys.shape[0]
    q = attention.q_proj(tokens).view(m, n // m * t, -1)
    out = _attend(q, attention.k_proj(keys + places), attention.v_proj(keys), attention.num_heads)
    return torch.as_tensor(attention.out_proj(out)).view(n, t, c)


def _write(attention: Any, tokens: Tensor, values: Tensor, keys: Tensor, places: Tensor) -> Tensor:
    """Image tokens keys (M, hw, C) attend to tokens (N, T, C); the result is (N, hw, C)."""
    n, m = tokens.shape[0], keys.shape[0]
    q = attention.q_proj(keys + places).repeat_interleave(n // m, 0)
    k, v = attention.k_proj(tokens), attention.v_proj(values)
    out: Tensor = attention.out_proj(_attend(q, k, v, attention.num_heads))
    return out


def _block(
    block: Any, queries: Tensor, keys: Tensor, tokens: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """One two-way block; queries and tokens (N, T, C), keys (M, hw, C) become (N, hw, C)."""
    if block.skip_first_layer_pe:
        queries = block.self_attn(q=queries, k=queries, v=queries)
    else:
        q = queries + tokens
        queries = queries + block.self_attn(q=q, k=q, v=queries)
    queries = block.norm1(queries)
    read = _read(block.cross_attn_token_to_image, queries + tokens, keys, places)
    queries = block.norm2(queries + read)
    queries = block.norm3(queries + block.mlp(queries))
    written = _write(block.cross_attn_image_to_token, queries + tokens, queries, keys, places)
    n, hw, c = written.shape
    keys = (written.view(len(keys), -1, hw, c) + keys[:, None]).view(n, hw, c)
    return queries, block.norm4(keys)


def blocks_of(x: Tensor, side: int) -> Tensor:
    """(B, C, s*h, s*w) with s = ``side`` to (B, h*w, s*s, C) in the order of repeated 2x2 steps."""
    b, c, height, width = x.shape
    steps = side.bit_length() - 1
    h, w = height // side, width // side
    x = x.view(b, c, h, *([2] * steps), w, *([2] * steps))
    order = [0, 2, 3 + steps]
    for i in range(steps):
        order += [3 + i, 4 + steps + i]
    return x.permute(*order, 1).reshape(b, h * w, side * side, c)


def upscale(decoder: Any, keys: Tensor, features: Features) -> Tensor:
    """Pixel features (N, h*w, 16, 32) of image tokens keys (N, h*w, 256), see `blocks_of`."""
    first, norm, _, second, _ = decoder.output_upscaling
    images, (n, hw, _) = len(features.fine), keys.shape
    middle, fine = blocks_of(features.middle, 2), blocks_of(features.fine, 4)
    x = keys @ first.weight.permute(0, 2, 3, 1).reshape(first.in_channels, -1)
    x = x.view(images, -1, hw, 4, first.out_channels) + (middle + first.bias)[:, None]
    x = F.gelu(F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps))
    x = x @ second.weight.permute(0, 2, 3, 1).reshape(second.in_channels, -1)
    x = x.view(images, -1, hw, 16, second.out_channels) + (fine + second.bias)[:, None]
    return F.gelu(x).view(n, hw, 16, second.out_channels)


def to_maps(x: Tensor, height: int) -> Tensor:
    """(N, h*w, 16, C) to (N, C, 4h, 4w)."""
    n, hw, _, c = x.shape
    w = hw // height
    x = x.view(n, height, w, 2, 2, 2, 2, c).permute(0, 7, 1, 3, 5, 2, 4, 6)
    return x.reshape(n, c, 4 * height, 4 * w)


def _output_tokens(decoder: Any) -> Tensor:
    tables: list[nn.Embedding] = [decoder.obj_score_token, decoder.iou_token, decoder.mask_tokens]
    return torch.cat([table.weight for table in tables])


def decode(
    model: Any,
    features: Features,
    points: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    half: bool = False,
) -> Decoded:
    """Answer N = B * P prompts on B images: points (N, K, 2) pixels, labels (N, K) as official.

    ``mask`` are previous logits (N, 1, S/4, S/4).  With ``half`` products run in bfloat16;
    positions are always encoded in float32.
    """
    prompt, decoder = model.sam_prompt_encoder, model.sam_mask_decoder
    sparse = prompt._embed_points(points, labels, pad=True)
    tokens = torch.cat([_output_tokens(decoder).expand(len(sparse), -1, -1), sparse], 1)
    places = prompt.get_dense_pe().flatten(2).transpose(1, 2)
    height = features.embedding.shape[2]
    keys = features.embedding.flatten(2).transpose(1, 2)
    if mask is None:
        keys = keys + prompt.no_mask_embed.weight
    else:
        dense = prompt._embed_masks(mask).flatten(2).transpose(1, 2)
        keys = keys.repeat_interleave(len(dense) // len(keys), 0) + dense
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        queries = tokens
        for block in decoder.transformer.layers:
            queries, keys = _block(block, queries, keys, tokens, places)
        final = decoder.transformer.final_attn_token_to_image
        queries = queries + _read(final, queries + tokens, keys, places)
        queries = decoder.transformer.norm_final_attn(queries)
        mlps = decoder.output_hypernetworks_mlps
        weights = torch.stack([mlp(queries[:, 2 + i]) for i, mlp in enumerate(mlps)], 2)
        pixels = upscale(decoder, keys, features)
        n, hw, _, c = pixels.shape
        logits = (pixels.view(n, hw * 16, c) @ weights.to(pixels.dtype)).view(n, hw, 16, -1)
        ious = decoder.iou_prediction_head(queries[:, 1])
        present = decoder.pred_obj_score_head(queries[:, 0])
    return Decoded(to_maps(logits.float(), height), ious.float(), present.float())


def pixel_features(model: Any, features: Features) -> Tensor:
    """The decoder's 32 pixel features (B, 32, S/4, S/4) as they are without any prompt."""
    decoder = model.sam_mask_decoder
    keys = decoder.transformer.layers[-1].norm4(features.embedding.flatten(2).transpose(1, 2))
    return to_maps(upscale(decoder, keys, features), features.embedding.shape[2])
