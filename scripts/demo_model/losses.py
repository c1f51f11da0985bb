"""What training minimises."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo_model.network import Decoded

OUTSIDE = 4.0
"""How much a pixel outside of an object's bounding box weighs where a box was the prompt."""


def mask_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy plus Dice per mask; logits and soft target (..., h, w), result (...).

    The cross-entropy of small objects weighs more: per-pixel errors are divided by the square
    root of the object's share of the image, halfway between per image and per object. ``weight``,
    of the logits' shape, is each pixel's own in the cross-entropy.
    """
    share = target.mean((-2, -1))
    entropy = F.binary_cross_entropy_with_logits(logits, target, weight, reduction="none")
    entropy = entropy.mean((-2, -1))
    chance = logits.sigmoid()
    overlap = (chance * target).sum((-2, -1))
    total = chance.sum((-2, -1)) + target.sum((-2, -1))
    dice = 1.0 - (2.0 * overlap + 1.0) / (total + 1.0)
    return entropy / (share + 0.005).sqrt() + dice


def box_weight(target: Tensor) -> Tensor:
    """1 within the bounding boxes of the objects (N, h, w), `OUTSIDE` elsewhere.

    A box says where nothing of the object is, which a decoder that follows colours alone ignores.
    """
    hit = target > 0
    rows, columns = hit.any(2), hit.any(1)
    inside = _between(rows)[:, :, None] & _between(columns)[:, None]
    return torch.where(inside, 1.0, OUTSIDE)


def _between(line: Tensor) -> Tensor:
    """From the first to the last true value of each row."""
    return (line.cumsum(1) > 0) & (line.flip(1).cumsum(1).flip(1) > 0)


@torch.no_grad()
def intersection_over_union(logits: Tensor, target: Tensor) -> Tensor:
    """IoU of the masks logits > 0 and target > 0.5, both (..., h, w)."""
    ours, truth = logits > 0, target > 0.5
    both = (ours & truth).sum((-2, -1)).float()
    either = (ours | truth).sum((-2, -1)).float()
    return both / either.clamp(min=1.0)


def decoder_loss(answer: Decoded, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of N answers against targets (N, h, w), and mask 0's IoU (N,).

    ``weight``: of the pixels, as the targets.

    Masks 1-3 learn beside mask 0, the best of them most: they may differ, but where mask 0 is
    unstable the official model answers with the one it thinks best, so none may be far off.  The
    quality head learns the true IoU of all four, the presence head that there is an object.
    """
    logits = answer.masks
    wanted = target[:, None].expand_as(logits)
    losses = mask_loss(
        logits, wanted, None if weight is None else weight[:, None].expand_as(logits)
    )
    ious = intersection_over_union(logits, wanted)
    others = losses[:, 1:]
    loss = losses[:, 0].mean() + 0.5 * (0.7 * others.min(1).values + 0.3 * others.mean(1)).mean()
    quality = F.mse_loss(answer.ious, ious)
    presence = F.softplus(-answer.present).mean()
    return loss + quality + 0.02 * presence, ious[:, 0]


class SeedLoss(nn.Module):
    """Dense supervision: a pixel's features must single out the pixels of its own object.

    From each image a number of seed pixels is drawn inside objects.  A small network turns a
    seed's 32 features into 32 weights; their inner product with all pixels' features, less a
    learned penalty for distance, is the logit of "same object".  This is what the mask tokens have
    to do with the feature they read at a click, at a fraction of the decoder's cost.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hyper = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
        self.near = nn.Parameter(torch.tensor(1.0))

    def forward(
        self, features: Tensor, labels: Tensor, seeds: Tensor, read: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mean loss with the seeds' own weights, and with the weights ``read`` (B, K, 32).

        features (B, 32, h, w), labels (B, h, w) at the same resolution, seeds (B, K) flat indices
        of pixels that belong to objects.
        """
        b, c, h, w = features.shape
        flat = features.flatten(2)
        own = flat.gather(2, seeds[:, None].expand(b, c, -1)).transpose(1, 2)
        rows, columns = torch.meshgrid(torch.arange(h) / h, torch.arange(w) / w, indexing="ij")
        places = torch.stack([rows.flatten(), columns.flatten()], -1)
        distance = torch.cdist(places[seeds.flatten()], places).view(b, -1, h * w)
        away = F.softplus(self.near) * 4.0 * distance
        ids = labels.flatten(1)
        same = ids.gather(1, seeds)[:, :, None] == ids[:, None]
        wanted = same.float().view(b, -1, h, w)
        direct = mask_loss((self.hyper(own) @ flat - away).view_as(wanted), wanted).mean()
        return direct, mask_loss((read @ flat - away).view_as(wanted), wanted).mean()
