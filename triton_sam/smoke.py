"""A smoke test: a real photo, a running server, and answers that can be told right from wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .client import SAM2TritonClient
from .demo import demo_photo
from .errors import PromptError, SmokeError
from .masks import Segmentation
from .pictures import draw_prompts, write_png

_T = TypeVar("_T")

# On a coin of the demo's photo, on another one, and a box around the first: pixels.
CLICK = (300, 168)
ELSEWHERE = (638, 580)
_BOX = (238, 110, 366, 228)

_SCORES = (-0.1, 1.1)
"""What a trained model's expected IoU stays within; not all models end in a sigmoid."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``needs_weights``: only a trained model can pass it."""

    name: str
    passed: bool
    found: str
    needs_weights: bool = False


@dataclass(frozen=True)
class Answers:
    """What the server said about the photo.

    ``refined``: ``None`` where the model takes no mask prompt, which a published SAM 3 pair does
    not. ``seconds``: of each exchange, by its name.
    """

    click: Segmentation
    again: Segmentation
    elsewhere: Segmentation
    box: Segmentation
    three: Segmentation
    refined: Segmentation | None
    seconds: dict[str, float]


def ask(client: SAM2TritonClient) -> Answers:
    """Encode the photo and prompt it in every way."""
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], _T]) -> _T:
        started = time.perf_counter()
        answer = call()
        seconds[name] = time.perf_counter() - started
        return answer

    started = time.perf_counter()
    client.set_image(demo_photo())
    seconds["encode"] = time.perf_counter() - started
    point = np.array([CLICK], np.float32)
    click = timed("click", lambda: client.segment(point, [1]))
    return Answers(
        click=click,
        again=timed("again", lambda: client.segment(point, [1])),
        elsewhere=timed("elsewhere", lambda: client.segment([ELSEWHERE], [1])),
        box=timed("box", lambda: client.segment(box=_BOX)),
        three=timed("three", lambda: client.segment(point, [1], multimask_output=True)),
        refined=timed("refined", lambda: _refine(client, point, click)),
        seconds=seconds,
    )


def _refine(
    client: SAM2TritonClient, point: NDArray[np.float32], first: Segmentation
) -> Segmentation | None:
    try:
        return client.segment(point, [1], mask_input=first.logits[:, :1])
    except PromptError:
        return None


def examine(answers: Answers) -> Iterator[Check]:
    """Hold the answers against what they must be for any weights, and for trained ones."""
    yield from _examine_values(answers)
    yield _examine_repetition(answers)
    yield _differs("another click changes the mask", answers.click, answers.elsewhere)
    if answers.refined is not None:
        yield _differs("mask_input changes the mask", answers.click, answers.refined)
    masks = answers.three.masks.shape[1]
    yield Check("multimask_output gives 3 masks", masks == 3, f"{masks}")
    yield from _examine_quality(answers)


def run(client: SAM2TritonClient, overlay: Path, *, any_weights: bool = False) -> list[Check]:
    """Ask, examine, and write the picture to look at to ``overlay``.

    ``any_weights``: what only a trained model can pass is reported and not required. Raises
    :class:`SmokeError` naming the first check that failed, after the picture was written.
    """
    answers = ask(client)
    checks = list(examine(answers))
    _draw(answers, overlay)
    for name, seconds in answers.seconds.items():
        print(f"{1e3 * seconds:9.1f} ms  {name}")
    for check in checks:
        print(f"{_verdict(check, any_weights):>12}  {check.name}: {check.found}")
    print(f"{'':12}  look at {overlay}")
    failed = [check for check in checks if _verdict(check, any_weights) == "FAILED"]
    if failed:
        raise SmokeError(
            f"{len(failed)} of {len(checks)} checks failed. The first: {failed[0].name}, and it "
            f"was {failed[0].found}."
        )
    return checks


def _verdict(check: Check, any_weights: bool) -> str:
    if check.passed:
        return "ok"
    return "not required" if any_weights and check.needs_weights else "FAILED"


def _examine_values(answers: Answers) -> Iterator[Check]:
    everything = [answers.click, answers.elsewhere, answers.box, answers.three]
    everything += [answers.refined] if answers.refined is not None else []
    finite = all(
        np.isfinite(answer.logits).all() and np.isfinite(answer.scores).all()
        for answer in everything
    )
    yield Check("logits and scores are finite", finite, "all" if finite else "NaN or infinity")
    scores = np.concatenate([answer.scores.ravel() for answer in everything])
    low, high = float(scores.min()), float(scores.max())
    within = _SCORES[0] <= low and high <= _SCORES[1]
    yield Check("scores are from 0 to 1", within, f"{low:.2f} to {high:.2f}", needs_weights=True)


def _examine_repetition(answers: Answers) -> Check:
    apart = _apart(answers.click, answers.again)
    # On a processor the bits are the same; some of a GPU's kernels add up in any order.
    same = apart <= 1e-4 * float(np.abs(answers.click.logits).max())
    found = "bit for bit" if apart == 0 else f"logits up to {apart:.1e} apart"
    return Check("the same call gives the same answer", same, found)


def _apart(one: Segmentation, other: Segmentation) -> float:
    return float(np.abs(one.logits - other.logits).max())


def _differs(name: str, one: Segmentation, other: Segmentation) -> Check:
    apart = _apart(one, other)
    return Check(name, apart > 0, f"logits up to {apart:.1f} apart")


def _examine_quality(answers: Answers) -> Iterator[Check]:
    for name, answer, (x, y) in (
        ("click", answers.click, CLICK),
        ("other click", answers.elsewhere, ELSEWHERE),
        ("refinement", answers.refined, CLICK),
    ):
        if answer is None:
            continue
        share = float(answer.masks[0, 0].mean())
        filled = 0 < share < 0.5
        yield Check(f"the {name}'s mask is an object", filled, f"{share:.1%} of the photo", True)
        hit = bool(answer.masks[0, 0, y, x])
        yield Check(f"the {name}'s mask holds the point", hit, "inside" if hit else "outside", True)
    overlap = _iou(answers.box.masks[0, 0], answers.click.masks[0, 0])
    yield Check("the box finds what the click finds", overlap > 0.5, f"IoU {overlap:.2f}", True)


def _iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return int(np.count_nonzero(one & other)) / max(1, int(np.count_nonzero(one | other)))


def _draw(answers: Answers, path: Path) -> None:
    together = Segmentation(
        masks=np.concatenate([answers.click.masks, answers.elsewhere.masks]),
        scores=np.concatenate([answers.click.scores, answers.elsewhere.scores]),
        logits=np.concatenate([answers.click.logits, answers.elsewhere.logits]),
    )
    picture = draw_prompts(together.overlay(demo_photo()), [CLICK, ELSEWHERE], [1, 1], _BOX)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(picture, path)
