"""Answers requests: encodes what is new, keeps it, and decodes in the order of urgency."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import InferenceError, InvalidInputError
from ..images import load_image, preprocess
from ..masks import clamp
from ..prompts import Prompt
from ..protocol import (
    Call,
    Prediction,
    Served,
    decode_calls,
    encode_call,
    read_output,
    read_prediction,
)
from ..specs import Family, Tensor
from ..specs.predictor import further_outputs
from .jobs import Job, Jobs, QueueFullError
from .masks import MOST_MASKS, Masks
from .messages import Arrays, PredictorError, Request, image_outputs
from .results import empty_outputs, prediction_outputs
from .settings import COUNTERS, Settings
from .store import Encoded, Store, image_handle

logger = logging.getLogger(__name__)

Content: TypeAlias = "bytes | NDArray[np.uint8]"
Reply = Callable[["Arrays | PredictorError"], None]


@dataclass(eq=False)
class _Ask:
    """A request, read; ``prompt`` is known once the image's size is."""

    request: Request
    handle: str
    deadline: float
    prompt: Prompt | None = None


@dataclass(eq=False)
class _Parts:
    """A request with more prompts than are decoded at a time, and how far it is.

    ``encoded``: its image, once it has begun; kept though the store may evict it meanwhile.
    ``done``: prompts whose rows of ``arrays`` are filled.
    """

    ask: _Ask
    prompt: Prompt
    encoded: Encoded | None = None
    done: int = 0
    arrays: Arrays = field(default_factory=dict)

    @property
    def width(self) -> int:
        return len(self.prompt.points)


@dataclass(eq=False)
class _Encoding:
    """An image that is being encoded, and everybody who waits for it."""

    waiting: list[_Ask] = field(default_factory=list)


class Runner(Protocol):
    """What runs the models: :class:`~triton_sam.predictor.engine.Engine`."""

    family: Family
    encoder_served: Served
    decoder_served: Served
    kept: tuple[Tensor, ...]

    def make_way(self) -> None: ...

    def encode(self, call: Call) -> Mapping[str, Any]: ...

    def decode(self, call: Call) -> Mapping[str, NDArray[Any]]: ...

    def hold(self, array: NDArray[Any]) -> Any: ...

    def close(self) -> None: ...


class Shared(Protocol):
    """Where predictors share images: :class:`~triton_sam.sharing.SharedStore`. Never raises."""

    def get(self, handle: str, since: float | None = None) -> Encoded | None: ...

    def put(self, handle: str, encoded: Encoded) -> None: ...

    def counts(self) -> dict[str, int]: ...

    def close(self) -> None: ...


class Predictor:
    """Encodes and decodes with ``engine`` for anybody, from any thread.

    ``shared``: where images are looked for before they are encoded, and written to after that.
    """

    def __init__(self, engine: Runner, settings: Settings, shared: Shared | None = None) -> None:
        self.family: Family = engine.family
        self._shared = shared
        self.store = Store(settings.store_bytes, settings.ttl_s)
        self._masks = Masks(settings.mask_bytes)
        self._engine = engine
        self._settings = settings
        self._clicks = Jobs(settings.max_waiting, settings.gather)
        self._images = Jobs(settings.max_waiting)
        self._encodings: dict[str, _Encoding] = {}
        self._begun: list[_Parts] = []
        self._fetches: dict[str, list[_Ask]] = {}
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(("encodes", "decodes", "decoded_prompts", "dropped"), 0)
        # What comes before the encoder and after the decoder, and would hold others up there.
        self._naming = ThreadPoolExecutor(1, "name")
        # Masks are named here in the order of their answers, and looked up after that.
        self._recalling = ThreadPoolExecutor(1, "recall")
        self._finishing = ThreadPoolExecutor(2, "finish")
        self._looking = ThreadPoolExecutor(4, "look")
        self._embedding_bytes = sum(map(_bytes, engine.kept))
        if settings.store_bytes < 2 * self._embedding_bytes:
            raise InvalidInputError(
                f"store_bytes is {settings.store_bytes}, expected {2 * self._embedding_bytes} or "
                f"more: an encoded image of {self.family.title} takes {self._embedding_bytes}."
            )
        self._decoder = _started("decode", self._clicks, lambda: None)
        self._encoders = [
            _started("encode", self._images, engine.make_way) for _ in range(settings.encoders)
        ]

    def submit(self, request: Request) -> None:
        """Answer a request, now or later; never raises."""
        request = replace(request, reply=_once(request.reply))
        _guarded(request.reply, lambda: self._submit(request))

    def counts(self) -> dict[str, int]:
        """The values of :data:`COUNTERS` and :data:`GAUGES`."""
        stats, masks = self.store.stats(), self._masks.stats()
        store = {
            f"store_{name}": getattr(stats, name)
            for name in ("hits", "misses", "evictions", "expired", "images")
        }
        redis = dict.fromkeys((name for name in COUNTERS if name.startswith("redis_")), 0)
        if self._shared is not None:
            redis = self._shared.counts()
        waiting = len(self._clicks) + len(self._images)
        store |= {"store_bytes": stats.nbytes, "mask_bytes": masks.nbytes}
        store |= {"mask_hits": masks.hits, "mask_misses": masks.misses}
        with self._lock:
            return {
                **store,
                **redis,
                **self._counts,
                "waiting": waiting,
            }

    def close(self) -> None:
        """Answer what waits, and end."""
        # In the order in which one gives work to the next.
        self._naming.shutdown()
        self._images.close()
        for thread in self._encoders:
            thread.join()
        self._looking.shutdown()
        self._recalling.submit(lambda: None).result()
        self._clicks.close()
        self._decoder.join()
        self._finishing.shutdown()
        self._recalling.shutdown()
        if self._shared is not None:
            self._shared.close()
        self._engine.close()

    def _submit(self, request: Request) -> None:
        deadline = time.monotonic() + request.seconds
        settings = self._settings
        request.check_counts(settings.max_prompts, settings.max_points, settings.max_clicks)
        content = request.content
        if content is None:
            if request.handle is None:
                raise InvalidInputError(
                    "A request names an image: encoded_image, image, or the image_handle of one "
                    "that was sent before."
                )
            self._look(_Ask(request, request.handle, deadline))
        else:
            # Its name takes milliseconds to work out, in which other requests are not taken in.
            self._naming.submit(_guarded, request.reply, partial(self._receive, request, deadline))

    def _receive(self, request: Request, deadline: float) -> None:
        """Go on with an image that was sent: encode it, unless it is there already."""
        content = request.content
        assert content is not None
        ask = _Ask(request, image_handle(content, request.tenant_key), deadline)
        if ask.handle in self.store:
            self._on_image(ask)
            return
        job = Job(
            run=lambda _: _guarded(request.reply, lambda: self._encode(ask, content)),
            drop=partial(self._drop, request),
            priority=request.priority,
            is_cancelled=request.is_cancelled,
            deadline=deadline,
        )
        self._put(self._images, job, request)

    def _count(self, what: str, times: int = 1) -> None:
        with self._lock:
            self._counts[what] += times

    def _drop(self, request: Request, reason: str) -> None:
        self._count("dropped")
        request.reply(_dropped(reason))

    def _put(self, jobs: Jobs, job: Job, request: Request) -> None:
        try:
            jobs.put(job)
        except QueueFullError as exc:
            request.reply(PredictorError("busy", f"The queue is full: {exc}. Try again later."))

    def _encode(self, ask: _Ask, content: Content) -> None:
        with self._lock:
            known = ask.handle in self.store
            under_way = self._encodings.get(ask.handle)
            if under_way is not None:
                under_way.waiting.append(ask)
            elif not known:
                self._encodings[ask.handle] = _Encoding([ask])
        if known:
            self._on_image(ask)
        if known or under_way is not None:
            return
        failure: PredictorError | None = None
        encoded: Encoded | None = None
        try:
            if not self._fetched(ask.handle, time.monotonic()):
                encoded = self._encode_content(ask.handle, content)
        except BaseException as exc:
            failure = _as_error(exc)
        with self._lock:
            waiting = self._encodings.pop(ask.handle).waiting
        for one in waiting:
            if failure is not None:
                one.request.reply(failure)
            else:
                _guarded(one.request.reply, partial(self._on_image, one))
        if self._shared is not None and encoded is not None:
            self._shared.put(ask.handle, encoded)

    def _look(self, ask: _Ask) -> None:
        """Go on with an image that was sent before, perhaps to another predictor."""
        if self._shared is None or ask.handle in self.store:
            self._on_image(ask)
            return
        with self._lock:
            first = ask.handle not in self._fetches
            self._fetches.setdefault(ask.handle, []).append(ask)
        if first:
            self._looking.submit(self._fetch, ask.handle, time.monotonic())

    def _fetch(self, handle: str, since: float) -> None:
        try:
            self._fetched(handle, since)
        except BaseException:
            logger.exception("an image was not fetched")
        with self._lock:
            waiting = self._fetches.pop(handle)
        for one in waiting:
            _guarded(one.request.reply, partial(self._on_image, one))

    def _fetched(self, handle: str, since: float) -> bool:
        """Whether the image was fetched from what is shared, and kept."""
        encoded = None if self._shared is None else self._shared.get(handle, since)
        return encoded is not None and self.store.put(handle, encoded)

    def _encode_content(self, handle: str, content: Content) -> Encoded:
        picture = load_image(content, self._settings.max_pixels)
        size = picture.height, picture.width
        pixels = preprocess(picture, self.family.image)
        call = encode_call(self.family, pixels, self._engine.encoder_served)
        with self.store.room(self._embedding_bytes):
            tensors = self._engine.encode(call)
            self._count("encodes")
            encoded = Encoded(tensors, size, self._embedding_bytes)
            if not self.store.put(handle, encoded, self._embedding_bytes):
                raise PredictorError("busy", "Every image that is kept is in use; try again later.")
        return encoded

    def _on_image(self, ask: _Ask) -> None:
        """Go on with an image that may be there."""
        request = ask.request
        size = self.store.size_of(ask.handle)
        if size is None:
            self._answer_unknown(ask)
            return
        arguments = request.prompts
        if not arguments:
            request.reply(_wanted(image_outputs(True, ask.handle, size), request))
            return
        if request.mask_names:
            self._recalling.submit(_guarded, request.reply, partial(self._recall, ask, size))
        else:
            self._prompted(ask, size, arguments)

    def _recall(self, ask: _Ask, size: tuple[int, int]) -> None:
        """Go on with the masks that the request names."""
        request = ask.request
        masks = self._masks.find(request.mask_names)
        if masks is not None:
            self._prompted(ask, size, request.prompts | {"mask_input": masks})
        elif "mask_found" in request.outputs:
            self._answer_empty(ask, image_outputs(True, ask.handle, size), mask_found=False)
        else:
            raise PredictorError(
                "unknown", "A mask of that mask_id is not here, or not any more; send mask_input."
            )

    def _prompted(self, ask: _Ask, size: tuple[int, int], arguments: dict[str, Any]) -> None:
        layout = self.family.prompts
        ask.prompt = Prompt.create(**arguments, original_size=size, layout=layout)
        self._put(self._clicks, self._decode_job(ask, ask.prompt), ask.request)

    def _decode_job(self, ask: _Ask, prompt: Prompt) -> Job:
        request = ask.request
        if len(prompt.points) > self._settings.gather:
            parts = _Parts(ask, prompt)
            return Job(
                run=lambda jobs: self._decode_part(jobs[0], parts),
                drop=partial(self._drop_parts, parts),
                priority=request.priority,
                width=parts.width,
                is_cancelled=request.is_cancelled,
                deadline=ask.deadline,
            )
        alone = prompt.mask is not None
        shape = (prompt.points.shape[1], prompt.boxes is None, prompt.multimask)
        return Job(
            run=lambda jobs: self._decode([job.subject for job in jobs]),
            drop=partial(self._drop, request),
            priority=request.priority,
            group=None if alone else (ask.handle, *shape),
            width=len(prompt.points),
            is_cancelled=request.is_cancelled,
            deadline=ask.deadline,
            subject=ask,
        )

    def _decode(self, asks: list[_Ask]) -> None:
        """Decode for requests about one image, together."""
        try:
            with self.store.pinned(asks[0].handle) as encoded:
                if encoded is None:
                    for ask in asks:
                        self._answer_unknown(ask)
                    return
                prompts = [ask.prompt for ask in asks if ask.prompt is not None]
                wanted = frozenset().union(*(ask.request.outputs for ask in asks))
                prediction, further = self._run(encoded, Prompt.join(prompts), wanted)
                size = encoded.original_size
        except BaseException as exc:
            for ask in asks:
                ask.request.reply(_as_error(exc))
            return
        start = 0
        for ask, prompt in zip(asks, prompts, strict=True):
            rows = slice(start, start + len(prompt.points))
            start = rows.stop
            own = Prediction(prediction.logits[rows], prediction.scores[rows])
            extra = {name: array[rows] for name, array in further.items()}
            self._hand_over(ask, own, extra, size)

    def _run(
        self, encoded: Encoded, prompt: Prompt, wanted: frozenset[str]
    ) -> tuple[Prediction, Arrays]:
        """Decode prompts together; what of ``wanted`` the decoder says beside masks and scores."""
        served = self._engine.decoder_served
        names = tuple(name for name in further_outputs(self.family) if name in wanted)
        names = tuple(name for name in names if name in served.outputs)
        calls = decode_calls(self.family, encoded, prompt, served, names)
        answers = [self._engine.decode(call) for call in calls]
        self._count("decodes", len(calls))
        self._count("decoded_prompts", len(prompt.points))
        prediction = read_prediction(self.family, answers, prompt, served)
        return prediction, {name: read_output(self.family, name, answers) for name in names}

    def _decode_part(self, job: Job, parts: _Parts) -> None:
        """Decode the next prompts of a request with many; the others wait for a further turn."""
        ask = parts.ask
        if not self._may_go_on(parts):
            self._clicks.put_back(job)
            return
        try:
            if parts.encoded is None:
                with self.store.pinned(ask.handle) as parts.encoded:
                    pass
            if parts.encoded is not None:
                self._fill(parts, parts.encoded)
        except BaseException as exc:
            self._end(parts)
            ask.request.reply(_as_error(exc))
            return
        if parts.encoded is None:
            self._end(parts)
            self._answer_unknown(ask)
        elif parts.done < parts.width:
            self._clicks.put_back(job)
        else:
            self._end(parts)
            further = dict(parts.arrays)
            prediction = Prediction(further.pop("logits"), further.pop("scores"))
            self._hand_over(ask, prediction, further, parts.encoded.original_size)

    def _may_go_on(self, parts: _Parts) -> bool:
        """Whether a request with many prompts has begun, or may: its masks so far take memory.

        The first of each priority always may, or it would wait for what waits for it.
        """
        priority = parts.ask.request.priority
        with self._lock:
            if parts in self._begun:
                return True
            first = all(other.ask.request.priority != priority for other in self._begun)
            together = parts.width + sum(other.width for other in self._begun)
            if first or together <= self._settings.max_begun:
                self._begun.append(parts)
                return True
            return False

    def _fill(self, parts: _Parts, encoded: Encoded) -> None:
        rows = slice(parts.done, parts.done + self._settings.gather)
        prompt = parts.prompt.rows(rows)
        prediction, further = self._run(encoded, prompt, parts.ask.request.outputs)
        found = {"logits": prediction.logits, "scores": prediction.scores, **further}
        for name, array in found.items():
            if name not in parts.arrays:
                whole = (parts.width, *array.shape[1:])
                parts.arrays[name] = np.empty(whole, array.dtype)
            parts.arrays[name][rows] = array
        parts.done += len(prompt.points)

    def _drop_parts(self, parts: _Parts, reason: str) -> None:
        self._end(parts)
        self._drop(parts.ask.request, reason)

    def _end(self, parts: _Parts) -> None:
        with self._lock, suppress(ValueError):
            self._begun.remove(parts)

    def _hand_over(
        self, ask: _Ask, prediction: Prediction, further: Arrays, size: tuple[int, int]
    ) -> None:
        """Answer; masks at full size in a thread of their own, for they take a while."""
        finish = partial(self._finish, ask, prediction, further, size)
        if ask.request.takes_long:
            self._finishing.submit(finish)
        else:
            finish()

    def _finish(
        self, ask: _Ask, prediction: Prediction, further: Arrays, size: tuple[int, int]
    ) -> None:
        request = ask.request

        def answer() -> None:
            arrays = image_outputs(True, ask.handle, size) | further
            arrays["mask_found"] = np.array([True])
            arrays |= prediction_outputs(self.family, prediction, size, request.outputs)
            if "mask_ids" in request.outputs:
                arrays["mask_ids"] = self._keep_masks(ask.handle, prediction.logits)
            elif prediction.scores.size <= MOST_MASKS:
                # In the queue before the answer is sent: who names one of these masks finds it.
                self._recalling.submit(self._keep_masks, ask.handle, prediction.logits)
            request.reply(_wanted(arrays, request))

        _guarded(request.reply, answer)

    def _keep_masks(self, handle: str, logits: NDArray[np.float32]) -> NDArray[np.object_]:
        return self._masks.keep(handle, clamp(logits, self.family.prompts.mask_clip))

    def _answer_unknown(self, ask: _Ask) -> None:
        request = ask.request
        if "found" not in request.outputs:
            error = PredictorError(
                "unknown",
                f"There is no image {ask.handle!r} here, or not any more; send it again.",
            )
            request.reply(error)
            return
        self._answer_empty(ask, image_outputs(False, ask.handle, (0, 0)), mask_found=False)

    def _answer_empty(self, ask: _Ask, arrays: Arrays, mask_found: bool) -> None:
        arrays["mask_found"] = np.array([mask_found])
        outputs = ask.request.outputs
        arrays |= empty_outputs(self.family, outputs, further_outputs(self.family))
        ask.request.reply(_wanted(arrays, ask.request))


def _started(name: str, jobs: Jobs, prepare: Callable[[], None]) -> threading.Thread:
    """A thread that carries out ``jobs`` until they are closed."""

    def work() -> None:
        prepare()
        while taken := jobs.take():
            taken[0].run(taken)
            del taken  # while this waits for others, they are not to be held

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


def _once(reply: Reply) -> Reply:
    """``reply``, which never raises, and of several answers sends the first.

    An answer that cannot be sent is that request's misfortune and no other's.
    """
    answered = threading.Lock()

    def safely(answer: Arrays | PredictorError) -> None:
        if answered.acquire(blocking=False):
            try:
                reply(answer)
            except Exception:
                logger.exception("an answer was not sent")

    return safely


def _guarded(reply: Reply, work: Callable[[], None]) -> None:
    try:
        work()
    except BaseException as exc:
        reply(_as_error(exc))


def _as_error(exc: BaseException) -> PredictorError:
    """What to answer; never ``exc`` itself, whose traceback holds the request and its arrays."""
    if isinstance(exc, PredictorError):
        return PredictorError(exc.kind, str(exc))
    if isinstance(exc, InvalidInputError):
        return PredictorError("invalid", str(exc))
    if isinstance(exc, InferenceError):
        return PredictorError("failed", str(exc))
    logger.error("a request failed", exc_info=exc)
    return PredictorError("failed", f"{type(exc).__name__}: {exc}")


def _dropped(reason: str) -> PredictorError:
    if reason == "cancelled":
        return PredictorError("cancelled", "The client cancelled the request.")
    return PredictorError("late", "The deadline of the request passed before it was done.")


def _wanted(arrays: Arrays, request: Request) -> Arrays:
    return {name: array for name, array in arrays.items() if name in request.outputs}


def _bytes(tensor: Tensor) -> int:
    # The leading axis is the batch.
    return 4 * int(np.prod(tensor.dims[1:]))
