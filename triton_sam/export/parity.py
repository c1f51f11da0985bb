"""Hold masks against the official predictor's, for every kind of prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from ..client import SAM2TritonClient
from ..errors import InferenceError, ModelNotReadyError
from ..images import load_image
from ..predictor.engine import Device, Engine
from ..predictor.messages import PredictorError, Request
from ..predictor.service import Predictor as Service
from ..predictor.settings import Settings
from ..processors import default_threads, session_options
from ..protocol import Call, Served
from ..specs import Family
from ..specs.predictor import predictor_model
from ..transport import Transport
from .memory import give_back_memory

LOGIT_TOLERANCE = 1e-3
"""Largest difference of a logit allowed, as a share of the largest logit of the call."""

MASK_IOU = 0.999
"""Smallest overlap allowed between a mask and the official one at the image's own size."""

Arrays = dict[str, Any]
Images = Mapping[str, Image.Image]


class Predictor(Protocol):
    """The part of ``SAM2ImagePredictor`` that is compared; other families adapt theirs to it."""

    def set_image(self, image: Image.Image) -> None:
        """Encode an 8-bit RGB image."""

    def predict(
        self,
        *,
        point_coords: Any = None,
        point_labels: Any = None,
        box: Any = None,
        mask_input: Any = None,
        multimask_output: bool = True,
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Masks at the image's size, scores and low-resolution logits.

        Takes what ``SAM2TritonClient.predict`` takes. Masks are boolean, or 0 and 1, and
        (B)xMxHxW, scores (B)xM, logits (B)xMxhxw; where B is 1 its axis may be missing.
        """


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
        options = session_options()
        self._sessions = {
            name: onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            for name, path in files.items()
        }

    def infer(self, call: Call, timeout_s: float | None = None) -> dict[str, NDArray[Any]]:
        values = self._sessions[call.model].run(list(call.outputs), dict(call.inputs))
        return dict(zip(call.outputs, values, strict=True))

    def served(self, model: str, timeout_s: float | None = None) -> Served:
        if model not in self._sessions:
            raise ModelNotReadyError(f"Not among the exported models: {model!r}.")
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


class PredictorTransport:
    """Runs a predictor in this process, in place of a server; its ``close`` closes that."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.model = predictor_model(service.family)

    def infer(self, call: Call, timeout_s: float | None = None) -> dict[str, NDArray[Any]]:
        try:
            return submit(self.service, call.outputs, **call.inputs).result()
        except PredictorError as exc:
            raise InferenceError(f"said: {exc}", str(exc), exc.kind == "invalid") from exc

    def served(self, model: str, timeout_s: float | None = None) -> Served:
        if model != self.model.name:
            raise ModelNotReadyError(f"There is no {model!r} here.")
        return Served(
            frozenset(tensor.name for tensor in self.model.inputs),
            frozenset(tensor.name for tensor in self.model.outputs),
        )

    def check_ready(self, models: Sequence[str], timeout_s: float | None = None) -> None:
        if list(models) != [self.model.name]:
            raise ModelNotReadyError(f"There is no {models!r} here.")

    def close(self) -> None:
        self.service.close()


def submit(service: Service, outputs: Iterable[str], **inputs: Any) -> Future[Arrays]:
    """Ask a predictor; the future gives the outputs or raises its :class:`PredictorError`."""
    future: Future[Arrays] = Future()

    def reply(given: Arrays | PredictorError) -> None:
        if isinstance(given, PredictorError):
            future.set_exception(given)
        else:
            future.set_result(given)

    cancelled = inputs.pop("cancelled", lambda: False)
    service.submit(Request(inputs, frozenset(outputs), reply, cancelled))
    return future


class Remembering:
    """Answers of an official predictor, kept: several ways of asking are held against the same."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._answers: dict[Any, tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = {}
        self._image = b""
        self._set = b""
        self._picture: Any = None

    def set_image(self, image: Image.Image) -> None:
        self._image, self._picture = image.tobytes(), image

    def predict(self, **prompt: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        given = {name: np.asarray(value).tobytes() for name, value in prompt.items()}
        key = (self._image, *sorted(given.items()))
        if key not in self._answers:
            if self._set != self._image:
                self._predictor.set_image(self._picture)
                self._set = self._image
            self._answers[key] = self._predictor.predict(**prompt)
        return self._answers[key]


def compare(
    family: Family,
    predictor: Predictor,
    files: Mapping[str, Path],
    images: Images | None = None,
    tie: float = 0.0,
) -> list[Difference]:
    """Compare the ONNX pair with ``predictor`` for every prompt kind.

    ``images``: by name; noise and a photo unless given. ``tie``: where one mask is asked for, the
    official model chooses it among several; another of them will do whose official score is this
    close to the chosen one's.
    """
    return _compare(family, predictor, OnnxRuntimeTransport(files), images, tie)


def compare_served(
    family: Family,
    predictor: Predictor,
    root: Path,
    images: Images | None = None,
    tie: float = 0.0,
) -> list[Difference]:
    """As :func:`compare`, for what a predictor makes of the decoder's graphs in ``root``.

    ``root`` is laid out as a repository, but needs no manifests.
    """
    engine = Engine(family, root, Device(), default_threads(), proven=True)
    service = Service(engine, Settings())
    return _compare(family, predictor, PredictorTransport(service), images, tie)


def _compare(
    family: Family, predictor: Predictor, transport: Transport, images: Images | None, tie: float
) -> list[Difference]:
    images = {**noise(), **photos(1)} if images is None else images
    with SAM2TritonClient(transport=transport, model_type=family.name) as client:
        found = [
            difference
            for name, image in images.items()
            for difference in compare_image(client, predictor, image, name, tie)
        ]
    give_back_memory()  # the sessions are closed; what is compared next loads its own
    return found


def noise() -> dict[str, Image.Image]:
    """A picture that holds every frequency."""
    values = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    return {"noise": Image.fromarray(values)}


def photos(count: int = 2) -> dict[str, Image.Image]:
    """The photos that come with the package, as far as ``count`` goes."""
    assets = package_files("triton_sam") / "assets"
    files = {"photo": "coffee.jpg", "second photo": "coins.png"}
    return {name: load_image(str(assets / file)) for name, file in list(files.items())[:count]}


def compare_image(
    client: SAM2TritonClient, predictor: Predictor, image: Image.Image, name: str, tie: float = 0.0
) -> Iterator[Difference]:
    """Set ``image`` on both and compare them on every prompt kind, single and multimask."""
    client.set_image(image)
    predictor.set_image(image)
    for prompt, arguments in prompts(predictor, image.size):
        yield _compare_call(client, predictor, arguments, name, prompt, tie)
        multimask = arguments | {"multimask_output": True}
        yield _compare_call(client, predictor, multimask, name, f"{prompt}, multimask", tie)


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
    client: SAM2TritonClient,
    predictor: Predictor,
    arguments: Arrays,
    image: str,
    title: str,
    tie: float,
) -> Difference:
    default: Arrays = {"multimask_output": False}  # the official one is True
    arguments = default | arguments
    masks, scores, logits = _ask(predictor, arguments)
    own = client.segment(**arguments)
    overlaps = _overlaps(own.masks, masks > 0)
    if tie and not arguments["multimask_output"] and (overlaps < MASK_IOU).any():
        others, their_scores, _ = _ask(predictor, arguments | {"multimask_output": True})
        near = np.abs(their_scores - scores) <= tie
        as_good = np.where(near, _overlaps(own.masks, others > 0), 0)
        overlaps = np.maximum(overlaps, as_good.max(axis=1, keepdims=True))
    return Difference(
        image=image,
        prompt=title,
        max_logit=float(np.abs(logits).max()),
        max_difference=float(np.abs(own.logits - logits).max()),
        max_score_difference=float(np.abs(own.scores - scores).max()),
        mask_iou=float(overlaps.min()),
        foreground=float((masks > 0).mean()),
    )


def _ask(predictor: Predictor, arguments: Arrays) -> Iterator[NDArray[Any]]:
    """Official masks BxMxHxW, scores BxM and logits BxMxhxw, also for a single prompt."""
    answer = zip(predictor.predict(**arguments), (4, 2, 4), strict=True)
    return (value if value.ndim == full else value[None] for value, full in answer)


def _overlaps(own: NDArray[np.bool_], official: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Intersection over union of each pair of masks; 1 where both are empty."""
    both = (own & official).sum(axis=(-2, -1))
    either = (own | official).sum(axis=(-2, -1))
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)
