"""Hold masks against the official predictor's, for every kind of prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from ..client import SAM2TritonClient
from ..errors import ModelNotReadyError
from ..images import load_image
from ..protocol import Call, Served
from ..specs import Family

LOGIT_TOLERANCE = 1e-3
"""Largest difference of a logit allowed, as a share of the largest logit of the call."""

MASK_IOU = 0.999
"""Smallest overlap allowed between a mask and the official one at the image's own size."""

Arrays = dict[str, Any]


class Predictor(Protocol):
    """The part of the official image predictors that is compared."""

    def set_image(self, image: Any) -> None: ...

    def predict(self, **prompt: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]: ...


@dataclass(frozen=True)
class Difference:
    """How far one call's result is from the official predictor's.

    ``max_logit``: largest absolute official logit. ``max_difference``: largest absolute
    difference of a logit; ``max_score_difference``: of a score. ``mask_iou``: smallest overlap
    of a mask with the official one, at the image's own size. ``foreground``: share of the
    official masks that is foreground; 0 or 1 says that the overlap means little.
    """

    image: str
    prompt: str
    max_logit: float
    max_difference: float
    max_score_difference: float
    mask_iou: float
    foreground: float

    @property
    def within_tolerance(self) -> bool:
        # Written so that a NaN is outside.
        return (
            self.max_difference <= LOGIT_TOLERANCE * self.max_logit
            and self.max_score_difference <= LOGIT_TOLERANCE
            and self.mask_iou >= MASK_IOU
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.prompt} on {self.image}: logits differ by {self.max_difference:.3g} of "
            f"{self.max_logit:.3g}, scores by {self.max_score_difference:.3g}, masks overlap by "
            f"{self.mask_iou:.5f}"
        )


class OnnxRuntimeTransport:
    """Runs the pair in this process, in place of a server."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._sessions = {
            name: onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            for name, path in files.items()
        }

    def infer(self, call: Call) -> dict[str, NDArray[Any]]:
        values = self._sessions[call.model].run(list(call.outputs), dict(call.inputs))
        return dict(zip(call.outputs, values, strict=True))

    def served(self, model: str) -> Served:
        session = self._sessions[model]
        # Overridable initializers are ONNX Runtime's word for optional inputs.
        inputs = session.get_inputs() + session.get_overridable_initializers()
        return Served(
            inputs=frozenset(tensor.name for tensor in inputs),
            outputs=frozenset(tensor.name for tensor in session.get_outputs()),
        )

    def check_ready(self, models: Sequence[str], timeout_s: float | None = None) -> None:
        missing = set(models).difference(self._sessions)
        if missing:
            raise ModelNotReadyError(f"Not among the exported models: {sorted(missing)}.")

    def close(self) -> None:
        self._sessions.clear()


def compare(family: Family, predictor: Predictor, files: Mapping[str, Path]) -> list[Difference]:
    """Compare the ONNX pair with ``predictor`` on noise and on a photo, for every prompt kind."""
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    photo = load_image(str(package_files("triton_sam") / "assets" / "coffee.jpg"))
    with SAM2TritonClient(transport=OnnxRuntimeTransport(files), model_type=family.name) as client:
        return [
            difference
            for name, image in (("noise", Image.fromarray(noise)), ("photo", photo))
            for difference in compare_image(client, predictor, image, name)
        ]


def compare_image(
    client: SAM2TritonClient, predictor: Predictor, image: Image.Image, name: str
) -> Iterator[Difference]:
    """Set ``image`` on both and compare them on every prompt kind, single and multimask."""
    client.set_image(image)
    predictor.set_image(image)
    for prompt, arguments in prompts(predictor, image.size):
        yield _compare_call(client, predictor, arguments, name, prompt)
        multimask = arguments | {"multimask_output": True}
        yield _compare_call(client, predictor, multimask, name, f"{prompt}, multimask")


def prompts(predictor: Predictor, size: tuple[int, int]) -> Iterator[tuple[str, Arrays]]:
    """Each kind of prompt for an image of ``size`` = (width, height), as ``predict`` takes it."""
    scale = np.array(size, np.float32)
    inner = np.random.default_rng(1).uniform(0.1, 0.9, (16, 2)).astype(np.float32) * scale
    clicks = {"point_coords": inner[:5], "point_labels": np.array([1, 0, 1, 0, 1])}
    box = np.concatenate([0.2 * scale, 0.7 * scale])
    one = {"point_coords": inner[:1], "point_labels": np.array([1])}
    yield "one click", one
    yield "clicks with negatives", clicks
    yield "padded clicks", clicks | {"point_labels": np.array([1, 0, 1, -1, -1])}
    yield "box", {"box": box}
    yield "box and clicks", clicks | {"box": box}
    # The official logits, so that both are given the very same mask.
    _, _, logits = predictor.predict(**one, multimask_output=False)
    yield "mask and clicks", clicks | {"mask_input": logits}
    yield "mask alone", {"mask_input": logits}
    yield "16 prompts", {"point_coords": inner[:, None], "point_labels": np.ones((16, 1), int)}
    corners = np.stack([inner[:3], inner[3:6]])
    yield "3 boxes", {"box": np.concatenate([corners.min(0), corners.max(0) + 1], 1)}


def _compare_call(
    client: SAM2TritonClient, predictor: Predictor, arguments: Arrays, image: str, title: str
) -> Difference:
    arguments = {"multimask_output": False} | arguments  # the official default is True
    masks, scores, logits = (
        value if value.ndim == full else value[None]
        for value, full in zip(predictor.predict(**arguments), (4, 2, 4), strict=True)
    )
    own = client.segment(**arguments)
    return Difference(
        image=image,
        prompt=title,
        max_logit=float(np.abs(logits).max()),
        max_difference=float(np.abs(own.logits - logits).max()),
        max_score_difference=float(np.abs(own.scores - scores).max()),
        mask_iou=_smallest_iou(own.masks, masks > 0),
        foreground=float((masks > 0).mean()),
    )


def _smallest_iou(own: NDArray[np.bool_], official: NDArray[np.bool_]) -> float:
    both = (own & official).sum(axis=(-2, -1))
    either = (own | official).sum(axis=(-2, -1))
    return float(np.where(either > 0, both / np.maximum(either, 1), 1.0).min())
