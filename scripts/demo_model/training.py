"""The training loop: one stage is a run of steps at one image size."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from tqdm import tqdm

from demo_model import fastpath, network, sampling
from demo_model.losses import SeedLoss, box_weight, decoder_loss, intersection_over_union
from demo_model.store import SceneStore

SEEDS_PER_OBJECT = 4
COLUMNS = (
    "step",
    "minutes",
    "size",
    "rate",
    "loss",
    "seed_loss",
    "bridge",
    "iou",
    "held_click",
    "held_box",
)


@dataclass(frozen=True)
class Stage:
    """How one stage trains; rates are AdamW learning rates, ``corrections`` is a probability.

    ``mean_decay`` is the share of the running mean of the weights that survives a step,
    ``slow_share`` what the parameters of `is_slow` get of the rate.
    """

    name: str
    size: int
    steps: int
    images: int
    prompts: int
    rate: float
    last_rate: float
    warmup: int
    boxes: float
    corrections: float
    half: bool
    seed_weight: float
    mean_decay: float
    slow_share: float


class Trainer:
    """Model, optimiser and running mean of the weights, with everything needed to resume."""

    def __init__(
        self, model: Any, store: SceneStore, folder: Path, seed: int, rank: int, workers: int
    ) -> None:
        self.rank, self.workers = rank, workers
        self.model, self.store, self.folder, self.seed = model, store, folder, seed
        self.seed_loss = SeedLoss()
        self.parameters = network.image_parameters(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        slow = [p for name, p in self.parameters.items() if is_slow(name)]
        fast = [p for name, p in self.parameters.items() if not is_slow(name)]
        groups = [
            {"params": [*fast, *self.seed_loss.parameters()]},
            {"params": slow},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
        self.mean = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step = 0
        self.stage_name = ""
        self.stage_step = 0
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        """Write ``last.pt``, from which `resume` goes on, and ``model.pt``, the model to use."""
        state = {
            "model": self.model.state_dict(),
            "seed_loss": self.seed_loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mean": self.mean,
            "counters": [self.step, self.stage_name, self.stage_step, self.seconds],
        }
        write_atomically(state, self.folder / "last.pt")
        published = dict(self.model.state_dict(), **self.mean)
        write_atomically({"model": network.exported_state(published)}, self.folder / "model.pt")

    def resume(self, path: Path) -> None:
        """Take up a checkpoint written by `save`."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.seed_loss.load_state_dict(state["seed_loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mean = state["mean"]
        self.step, self.stage_name, self.stage_step, self.seconds = state["counters"]

    def start(self, weights: dict[str, Tensor]) -> None:
        """Begin with the weights of a trained model instead of initial values."""
        self.model.load_state_dict(weights)
        self.mean = {name: p.detach().clone() for name, p in self.parameters.items()}

    def update_mean(self, longest: float) -> None:
        """Move the running mean of the weights towards the present ones."""
        decay = min(longest, (1 + self.step) / (20 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.mean.values()), list(self.parameters.values()), 1.0 - decay
            )

    def run(self, stage: Stage) -> None:
        """Train one stage, going on where an interrupted stage of the same name stopped."""
        if self.stage_name != stage.name:
            self.stage_name, self.stage_step = stage.name, 0
        network.set_size(self.model, stage.size)
        self.model.train()
        held = held_out_batch(self.store, stage.size)
        begin, saved_at = time.monotonic() - self.seconds, time.monotonic()
        means: dict[str, float] = {}
        left = stage.steps - self.stage_step
        batches = prefetched(self.store, stage, [self.seed, self.rank, self.step], left)
        bar = tqdm(
            batches,
            initial=self.stage_step,
            total=stage.steps,
            desc=stage.name,
            disable=self.rank > 0,
        )
        for batch in bar:
            figures = self.train_step(stage, batch)
            self.step, self.stage_step = self.step + 1, self.stage_step + 1
            self.seconds = time.monotonic() - begin
            for key, value in figures.items():
                means[key] = value if key not in means else 0.97 * means[key] + 0.03 * value
            bar.set_postfix({k: f"{v:.3f}" for k, v in means.items()}, refresh=False)
            last = self.stage_step == stage.steps
            if self.rank > 0:
                continue
            if self.stage_step % 100 == 0 or last:
                self.record(stage, means, held)
            if last or time.monotonic() - saved_at > 180:
                self.save()
                saved_at = time.monotonic()

    def train_step(self, stage: Stage, batch: sampling.Batch) -> dict[str, float]:
        """One optimiser step; returns the figures to log."""
        torch.manual_seed(hash_of(self.seed, self.step, self.rank))
        rate = rate_at(stage, self.stage_step)
        for group, share in zip(self.optimizer.param_groups, (1.0, stage.slow_share), strict=True):
            group["lr"] = rate * share
        features = network.encode(self.model, network.normalise(batch.images), stage.half)
        masks = sampling.full_masks(batch)
        target = sampling.targets(masks)
        dense = fastpath.pixel_features(self.model, features)
        labels, seeds = seeds_of(batch, target)
        width = labels.shape[-1]
        cells = seeds // width // 4 * (width // 4) + seeds % width // 4
        read = network.token_after_reading(self.model, features, cells)
        seed, bridge = self.seed_loss(dense, labels, seeds, read)
        loss, ious = self.prompt_loss(stage, features, masks, target)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + stage.seed_weight * (seed + bridge) + 5.0 * network.drowned(features)).backward()
        self.share_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.update_mean(stage.mean_decay)
        return {
            "loss": loss.item(),
            "seed_loss": seed.item(),
            "bridge": bridge.item(),
            "iou": ious.mean().item(),
        }

    def share_gradients(self) -> None:
        """Average the gradients of all workers, so that they take the same step."""
        if self.workers == 1:
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.flatten() for p in parameters])
        distributed.all_reduce(flat)
        flat /= self.workers
        pieces = torch.split(flat, [p.numel() for p in parameters])
        for p, piece in zip(parameters, pieces, strict=True):
            p.grad.copy_(piece.view_as(p))

    def prompt_loss(
        self, stage: Stage, features: network.Features, masks: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Ask for some of each image's objects by boxes, for the others by clicks."""
        images = len(features.fine)
        each = len(masks) // images
        boxes = min(each, int(each * stage.boxes + float(torch.rand(()))))
        loss, ious = torch.zeros(()), []
        # Objects are in random order: the first ones of each image get boxes.
        for by_box, chosen in ((True, slice(boxes)), (False, slice(boxes, None))):
            whole = masks.view(images, each, *masks.shape[1:])[:, chosen].flatten(0, 1)
            if len(whole):
                wanted = target.view(images, each, *target.shape[1:])[:, chosen].flatten(0, 1)
                prompts = sampling.box(whole, 0.08) if by_box else sampling.click(wanted)
                weight = box_weight(wanted) if by_box else None
                part, found = self.rounds_loss(stage, features, prompts, wanted, weight)
                loss = loss + part * (len(whole) / len(masks))
                ious.append(found)
        return loss, torch.cat(ious)

    def rounds_loss(
        self,
        stage: Stage,
        features: network.Features,
        prompts: tuple[Tensor, Tensor],
        target: Tensor,
        weight: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Ask for each object, and now and then correct the answers; the first answers' IoUs.

        ``weight``: of the targets' pixels, in every round.
        """
        # All workers make as many rounds, so that none waits for another.
        common = np.random.default_rng([self.seed, self.step])
        points, labels = prompts
        answer = fastpath.decode(self.model, features, points, labels, half=stage.half)
        loss, ious = decoder_loss(answer, target, weight)
        rounds = 0
        while rounds < 2 and common.uniform() < stage.corrections:
            rounds += 1
            previous = answer.masks[:, :1].detach().clamp(-32, 32)
            more, signs = sampling.corrective_click(previous[:, 0], target)
            points, labels = torch.cat([points, more], 1), torch.cat([labels, signs], 1)
            answer = fastpath.decode(self.model, features, points, labels, previous, stage.half)
            loss = loss + decoder_loss(answer, target, weight)[0]
        return loss / (1 + rounds), ious

    def record(self, stage: Stage, means: dict[str, float], held: sampling.Batch) -> None:
        """Append a line to ``curve.csv``."""
        click, box = self.held_out(held)
        rate = rate_at(stage, self.stage_step)
        values = [self.step, f"{self.seconds / 60:.2f}", stage.size, f"{rate:.2e}"]
        values += [f"{means[k]:.4f}" for k in ("loss", "seed_loss", "bridge", "iou")]
        path = self.folder / "curve.csv"
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(COLUMNS)
            writer.writerow([*values, f"{click:.4f}", f"{box:.4f}"])

    @torch.no_grad()
    def held_out(self, batch: sampling.Batch) -> tuple[float, float]:
        """The mean weights' IoU on a fixed batch at training size: one click, a box."""
        now = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.set_weights(self.mean)
        torch.manual_seed(1)
        features = network.encode(self.model, network.normalise(batch.images))
        masks = sampling.full_masks(batch)
        target = sampling.targets(masks)
        figures = []
        for points, labels in (sampling.click(target), sampling.box(masks, 0.0)):
            answer = fastpath.decode(self.model, features, points, labels)
            figures.append(intersection_over_union(answer.masks[:, 0], target).mean().item())
        self.set_weights(now)
        return figures[0], figures[1]

    @torch.no_grad()
    def set_weights(self, values: dict[str, Tensor]) -> None:
        """Copy values into the trained parameters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


def is_slow(name: str) -> bool:
    """Whether a parameter takes part in finding prompts, which works from the start.

    Large steps there, taken before the pixel features mean anything, would undo it.
    """
    finds = ("q_proj", "k_proj", "_token", "_embed")
    return not name.startswith("image_encoder.") and any(part in name for part in finds)


def write_atomically(state: Any, path: Path) -> None:
    """Save beside the target, then rename, so that a reader never sees half a file."""
    part = path.with_name(f".{path.name}.part")
    torch.save(state, part)
    part.replace(path)


def hash_of(*numbers: int) -> int:
    """A seed that depends on all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def rate_at(stage: Stage, step: int) -> float:
    """Learning rate: a linear rise, then a cosine from ``rate`` to ``last_rate``."""
    rise = min(1.0, (step + 1) / max(1, stage.warmup))
    fall = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / stage.steps))
    return rise * (stage.last_rate + (stage.rate - stage.last_rate) * fall)


def seeds_of(batch: sampling.Batch, target: Tensor) -> tuple[Tensor, Tensor]:
    """The label map at stride 4 (B, h, w) and seed pixels (B, P * seeds) inside the objects."""
    labels = batch.labels[:, 2::4, 2::4].long()
    own = (labels[:, None] == batch.objects[:, :, None, None]).float().flatten(0, 1)
    flat = (own * (target + 0.01)).flatten(1) + 1e-9
    seeds = torch.multinomial(flat, SEEDS_PER_OBJECT, replacement=True)
    return labels, seeds.view(len(labels), -1)


def held_out_batch(store: SceneStore, size: int) -> sampling.Batch:
    """A fixed batch from scenes that training never draws."""
    images = max(4, 16 * 256 * 256 // size**2)
    return sampling.draw_batch(np.random.default_rng(99), store.held_out(), size, images, 5)


def prefetched(
    store: SceneStore, stage: Stage, seed: list[int], count: int
) -> Iterator[sampling.Batch]:
    """``count`` batches; one thread prepares the next while a step runs."""

    def make(index: int) -> sampling.Batch:
        rng = np.random.default_rng([*seed, index])
        return sampling.draw_batch(rng, store, stage.size, stage.images, stage.prompts)

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, 0)
        for index in range(count):
            batch = coming.result()
            coming = pool.submit(make, index + 1)
            yield batch
