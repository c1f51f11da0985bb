"""What a client decides, without I/O; the sync and the async client carry it out."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .cache import EmbeddingCache
from .embedding import Embedding, EmbeddingKey
from .errors import (
    ClientClosedError,
    ImageError,
    ImageNotSetError,
    InferenceError,
    InvalidInputError,
    ModelNotReadyError,
    PromptError,
    ServerError,
    ServerTimeoutError,
    ServerUnavailableError,
    SharedMemoryError,
)
from .fingerprint import probe_calls, read_fingerprint
from .flow import Deadline, Exchange, Flow, Pause, Shared, Work
from .images import ImageSource, digest, load_image, preprocess
from .masks import Preview, Segmentation, clamp, masks_at
from .painting import preview
from .predictor.jobs import Priority
from .predictor.store import image_handle
from .prompts import Prompt
from .protocol import (
    Arrays,
    Call,
    Prediction,
    Served,
    decode_calls,
    encode_call,
    read_embedding,
    read_prediction,
)
from .server_embedding import (
    Content,
    NotedMasks,
    ServerEmbedding,
    click_call,
    find_call,
    read_click,
    read_content,
    read_found,
    send_call,
)
from .shared_embedding import Regions, SharedEmbedding, make_region
from .shared_memory import PREFIX, Region, is_left, remove_dead
from .specs import Family, family
from .specs.predictor import predictor_model
from .transport.options import TransportOptions, check_timeout
from .transport.requests import ListRegions, Memory, Register, Unregister

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

DEFAULT_URL = "localhost:8000"
_POLL_S = 0.2
_SHORTEST_S = 0.001
_TAKE_BACK_S = 2.0
_TAKE_BACK_POLL_S = 0.02
_LAST_TAKE_BACK_S = 0.5
# A model may be swapped while it serves, without a failed call that would tell us.
_VERSION_AGE_S = 10.0

MakePrompt = Callable[..., Prompt]
"""``Prompt.create`` with everything but the image's size and the layout."""

Where = Literal["auto", "server", "client", "shared-memory"]
"""Where embeddings are kept."""

Masks = tuple[NDArray[np.float32], NDArray[np.float32]]


def server_url(url: str | None) -> str:
    """``url``, or the environment's ``TRITON_URL``, or ``localhost:8000``."""
    return url or os.environ.get("TRITON_URL") or DEFAULT_URL


def client_options(options: TransportOptions | None, timeout_s: float | None) -> TransportOptions:
    """``options`` with ``timeout_s``, where one is given, in place of theirs."""
    options = options or TransportOptions()
    return options if timeout_s is None else replace(options, timeout_s=timeout_s)


@dataclass(frozen=True, eq=False)
class Decoded:
    """What came of prompts about an image of ``original_size`` = (height, width)."""

    prediction: Prediction
    original_size: tuple[int, int]
    family: Family
    preview: Preview

    def low_res(self) -> Masks:
        """Logits at the decoder's size and scores, as ``predict`` returns them."""
        clip = self.family.prompts.mask_clip
        return clamp(self.prediction.logits, clip), self.prediction.scores

    def segmentation(self) -> Segmentation:
        """Masks at the size of the image; takes a few milliseconds for each megapixel."""
        logits, scores = self.low_res()
        # As the official predictor: from the logits before they are clamped.
        masks = masks_at(self.prediction.logits, self.original_size, self.family.image)
        return Segmentation(masks, scores, logits, self.preview)


class ClientCore:
    """The state of a client and the flows of its calls; the other side is a transport."""

    def __init__(
        self,
        model_type: str,
        variant: str | None,
        max_image_pixels: int,
        cache: EmbeddingCache | None = None,
        where: Where = "auto",
        tenant_key: str | bytes = b"",
    ) -> None:
        if where not in get_args(Where):
            raise InvalidInputError(
                f"embedding is one of {', '.join(map(repr, get_args(Where)))}; got {where!r}."
            )
        if where in ("server", "shared-memory") and cache is not None:
            raise InvalidInputError(
                f"A cache keeps embeddings that the client has; embedding={where!r} leaves them "
                "with the server. Give one of the two."
            )
        # Whoever brings a cache wants the embeddings here.
        self._where: Where = "client" if cache is not None else where
        self._tenant_key = tenant_key.encode() if isinstance(tenant_key, str) else tenant_key
        plain = family(model_type)
        self.family = plain.named(variant)
        # Whatever is served under the plain name: which variant that is only the server knows.
        self._variant = "" if self.family is plain else variant or ""
        self._max_image_pixels = max_image_pixels
        # Without a cache nothing is kept; calls at the same time still share an encoding.
        self._uncached = EmbeddingCache()
        self._cache = cache or self._uncached
        self._masks = NotedMasks(self.family)
        self._regions = Regions()
        self._served: dict[str, Served] = {}
        self._fingerprint: str | None = None
        self._fingerprint_end = 0.0  # on the monotonic clock: then it is asked for again
        self._image: tuple[Embedding, Preview] | None = None
        self._tickets = itertools.count(1)
        self._current_ticket = 0
        self.closed = False

    def close(self) -> bool:
        """Whether it was open until now."""
        was_open, self.closed = not self.closed, True
        self._image = None
        self._regions.release_all()
        return was_open

    def current(self) -> Embedding:
        """The image that is set."""
        self._refuse_closed()
        if self._image is None:
            raise ImageNotSetError("No image is set; call set_image first.")
        return self._image[0]

    def encode(self, image: ImageSource, timeout_s: float | None = None) -> Flow[Embedding]:
        embedding, _ = yield from self._encoded(image, timeout_s)
        return embedding

    def set_image(self, image: ImageSource, timeout_s: float | None = None) -> Flow[None]:
        ticket = next(self._tickets)
        embedding, picture = yield from self._encoded(image, timeout_s)
        shown: Preview = None
        if isinstance(embedding, ServerEmbedding):
            shown = embedding.preview
        elif picture is not None:
            shown = yield Work(partial(preview, picture))
        # Of several at once the one that was asked for last stays, however long each takes.
        if ticket > self._current_ticket and not self.closed:
            self._image, self._current_ticket = (embedding, shown), ticket
        yield from self.take_back()

    def predict(
        self, make_prompt: MakePrompt, embedding: Embedding | None, timeout_s: float | None
    ) -> Flow[Masks]:
        return (yield from self.decode(make_prompt, embedding, timeout_s)).low_res()

    def segment(
        self, make_prompt: MakePrompt, embedding: Embedding | None, timeout_s: float | None
    ) -> Flow[Segmentation]:
        decoded = yield from self.decode(make_prompt, embedding, timeout_s)
        segmentation: Segmentation = yield Work(decoded.segmentation)
        return segmentation

    def decode(
        self,
        make_prompt: MakePrompt,
        embedding: Embedding | None,
        timeout_s: float | None,
        priority: Priority = Priority.CLICK,
    ) -> Flow[Decoded]:
        embedding = self.chosen(embedding)
        current, shown = self._image or (None, None)
        deadline = _deadline(timeout_s)
        prompt = make_prompt(original_size=embedding.original_size, layout=self.family.prompts)
        if isinstance(embedding, ServerEmbedding):
            prediction = yield from self._clicked(embedding, prompt, priority, deadline)
        else:
            served = yield from self._what_is_served(self.family.decoder.name, deadline)
            answers = []
            for call in decode_calls(self.family, embedding, prompt, served):
                answers.append((yield from self._infer_about(embedding, call, deadline)))
            prediction = read_prediction(self.family, answers, prompt, served)
        return Decoded(
            prediction,
            embedding.original_size,
            self.family,
            shown if embedding is current else None,
        )

    def is_ready(self) -> Flow[bool]:
        self._refuse_closed()
        try:
            yield from self._check_ready(None)
        except ServerError as exc:
            logger.debug("not ready: %s", exc)
            return False
        return True

    def wait_until_ready(self, timeout_s: float) -> Flow[None]:
        self._refuse_closed()
        end = time.monotonic() + timeout_s
        while True:
            try:
                # A server that hangs must not hold us longer than we were told to wait.
                yield from self._check_ready(max(end - time.monotonic(), _POLL_S))
                return
            except ServerError as exc:
                if time.monotonic() + _POLL_S >= end:
                    raise ServerTimeoutError(f"Not ready within {timeout_s:g} s. {exc}") from exc
            yield Pause(_POLL_S)

    def _encoded(
        self, image: ImageSource, timeout_s: float | None
    ) -> Flow[tuple[Embedding, Image | None]]:
        """The embedding, new or kept, and the picture if it was decoded here."""
        self._refuse_closed()
        deadline = _deadline(timeout_s)
        if (yield from self._keeps_on_server(deadline)):
            return (yield from self._on_server(image, deadline)), None
        picture, name = yield Work(partial(self._loaded, image))
        version = yield from self._model_version(deadline)
        cache = self._uncached if version is None else self._cache
        key = EmbeddingKey(name, self.family.name, self._variant, version or "")
        left = _left(deadline)
        embedding: Embedding = yield Shared(
            flow=lambda: self._encode(picture, key, deadline),
            wait=lambda encode: cache.get_or_encode(key, encode, left),
            wait_async=lambda encode: cache.get_or_encode_async(key, encode, left),
        )
        return embedding, picture

    def _keeps_on_server(self, deadline: Deadline) -> Flow[bool]:
        """Whether the server's predictor is to be used."""
        if self._where != "auto":
            return self._where == "server"
        try:
            # Asked again where there is none: less than a thousandth of the encoding that follows.
            yield from self._what_is_served(predictor_model(self.family).name, deadline)
        except ModelNotReadyError:
            return False
        return True

    def _on_server(self, image: ImageSource, deadline: Deadline) -> Flow[ServerEmbedding]:
        """Have the server encode an image that it does not have yet."""
        content: Content = yield Work(partial(read_content, image, self._max_image_pixels))
        handle = yield Work(partial(image_handle, content, self._tenant_key))
        calls = find_call(self.family, handle), send_call(self.family, content, self._tenant_key)
        for call in calls:
            try:
                arrays = yield from self._infer(call, deadline)
            except InferenceError as exc:
                raise ImageError(exc.reason) if exc.is_invalid else exc from exc
            found = read_found(
                *(self.family, self._variant, content, self._tenant_key, self._max_image_pixels),
                arrays,
            )
            if found is not None:
                return found
        raise InferenceError(f"{self.family.title} encoded an image and did not keep it.")

    def _clicked(
        self, embedding: ServerEmbedding, prompt: Prompt, priority: Priority, deadline: Deadline
    ) -> Flow[Prediction]:
        """Masks of an image on the server; what was forgotten there is sent again."""
        again, names = False, None
        if prompt.mask is not None:
            names = yield Work(partial(self._masks.names, embedding.digest, prompt.mask))
        for _ in range(3):
            call = click_call(self.family, embedding, prompt, priority, again, names)
            try:
                arrays = yield from self._infer(call, deadline)
            except InferenceError as exc:
                raise PromptError(exc.reason) if exc.is_invalid else exc from exc
            answer = read_click(self.family, prompt, arrays)
            if isinstance(answer, Prediction):
                self._masks.note(embedding.digest, answer.logits)
                return answer
            # A server that has lost the image, perhaps in a restart, has its masks no more.
            again, names = again or answer == "image", None
            if prompt.mask is not None:
                self._masks.forget(embedding.digest, prompt.mask)
        raise InferenceError(f"{self.family.title} encoded an image and did not keep it.")

    def _encode(self, picture: Image, key: EmbeddingKey, deadline: Deadline) -> Flow[Embedding]:
        pixels = yield Work(partial(preprocess, picture, self.family.image))
        served = yield from self._what_is_served(self.family.encoder.name, deadline)
        call = encode_call(self.family, pixels, served)
        size = picture.height, picture.width
        if self._where == "shared-memory":
            return (yield from self._encode_shared(call, size, key, deadline))
        arrays = yield from self._infer(call, deadline)
        return read_embedding(self.family, call, arrays, size, key)

    def _encode_shared(
        self, call: Call, size: tuple[int, int], key: EmbeddingKey, deadline: Deadline
    ) -> Flow[Embedding]:
        """Have the encoder write into memory that the decoder will read."""
        region, places = yield Work(partial(make_region, self.family, call.outputs))
        self._regions.lend(region)
        try:
            yield from self._lend(region, deadline)
            yield from self._infer_shared(region, replace(call, outputs_at=places), deadline)
        except BaseException:
            self._regions.release(region)
            raise
        tensors = {name: region.array(place) for name, place in places.items()}
        embedding = SharedEmbedding(tensors, size, **asdict(key), places=places, region=region)
        self._regions.end_with(embedding, region)
        return embedding

    def _infer_about(self, embedding: Embedding, call: Call, deadline: Deadline) -> Flow[Arrays]:
        """Run the decoder, with the embedding where the server can best have it."""
        if isinstance(embedding, SharedEmbedding) and embedding.region in self._regions:
            placed = embedding.placed(call)
            return (yield from self._infer_shared(embedding.region, placed, deadline))
        return (yield from self._infer(call, deadline))

    def _infer_shared(self, region: Region, call: Call, deadline: Deadline) -> Flow[Arrays]:
        """:meth:`_infer` with memory of which a server that was restarted is told again."""
        try:
            return (yield from self._infer(call, deadline))
        except InferenceError:
            if region.name in (yield from self._manage(ListRegions(), deadline)):
                raise
        yield from self._lend(region, deadline)
        return (yield from self._infer(call, deadline))

    def _lend(self, region: Region, deadline: Deadline) -> Flow[None]:
        """Tell the server of a region, and have it forget those that are left of others."""
        yield from self._manage(Register(region.name, region.nbytes), deadline)
        # Not before: now it is known that the server sees the same regions.
        yield Work(remove_dead)
        for name in (yield from self._manage(ListRegions(), deadline)):
            if name.startswith(PREFIX) and not is_left(name):
                self._regions.forget(name)
        yield from self.take_back()

    def _manage(self, request: Memory, deadline: Deadline) -> Flow[Any]:
        left = _left(deadline)
        try:
            return (yield Exchange(partial(_memory, request, left)))
        except (InferenceError, ServerUnavailableError) as exc:
            # Over gRPC an endpoint that takes a key says that it is unavailable.
            if isinstance(exc, ServerUnavailableError) and "restricted" not in str(exc):
                raise
            raise SharedMemoryError(
                f"The server takes no shared memory of this program ({exc}). "
                "embedding='shared-memory' needs a server on this machine that allows it and runs "
                "as the same user, in a container with the host's IPC namespace (docs/deploy.md); "
                "embedding='auto' works everywhere."
            ) from exc

    def take_back(self) -> Flow[None]:
        """Have the server forget the memory that is not used any more.

        It refuses for a moment after it has answered, and while it is at work on a call that was
        given up. Then it is asked again with the next image; a closed client asks for a little
        longer, and leaves what is still in use to the next client.
        """
        end = time.monotonic() + (_LAST_TAKE_BACK_S if self.closed else 0.0)
        while True:
            refused = []
            while (name := self._regions.take_released()) is not None:
                try:
                    yield Exchange(partial(_memory, Unregister(name), _TAKE_BACK_S))
                except InferenceError as exc:
                    logger.debug("%s is still with the server: %s", name, exc)
                    refused.append(name)
                except ServerError as exc:
                    logger.debug("%s is left with the server: %s", name, exc)
            for name in refused:
                self._regions.forget(name)
            if not refused or time.monotonic() >= end:
                return
            yield Pause(_TAKE_BACK_POLL_S)

    def _model_version(self, deadline: Deadline) -> Flow[str | None]:
        """What tells the served models from others; ``None`` where it has to be known and isn't."""
        if not self._cache.keeps:
            return None
        if self._fingerprint is None or time.monotonic() >= self._fingerprint_end:
            try:
                served = yield from self._what_is_served(self.family.decoder.name, deadline)
                answers = []
                for call in probe_calls(self.family, served):
                    answers.append((yield from self._infer(call, deadline)))
            except ServerError as exc:
                logger.warning("the cache is left out, since the decoder does not answer: %s", exc)
                return None
            self._fingerprint = read_fingerprint(self.family, answers, served)
            self._fingerprint_end = time.monotonic() + _VERSION_AGE_S
        return self._fingerprint

    def _infer(self, call: Call, deadline: Deadline) -> Flow[Arrays]:
        started = time.perf_counter()
        left = _left(deadline)
        try:
            arrays: Arrays = yield Exchange(lambda transport: transport.infer(call, left))
        except ServerError:
            # Another server may stand there by now: ask anew what it serves.
            self._served.pop(call.model, None)
            self._fingerprint = None
            raise
        logger.debug("%s took %.1f ms", call.model, 1e3 * (time.perf_counter() - started))
        return arrays

    def _what_is_served(self, model: str, deadline: Deadline) -> Flow[Served]:
        if model not in self._served:
            left = _left(deadline)
            served: Served = yield Exchange(lambda transport: transport.served(model, left))
            self._served[model] = served
            return served
        return self._served[model]

    def _check_ready(self, timeout_s: float | None) -> Flow[None]:
        pair = [model.name for model in self.family.models]
        predictor = [predictor_model(self.family).name]
        if self._where == "server":
            yield Exchange(lambda transport: transport.check_ready(predictor, timeout_s))
            return
        try:
            yield Exchange(lambda transport: transport.check_ready(pair, timeout_s))
        except ModelNotReadyError as exc:
            if self._where != "auto":
                raise
            try:  # a server may have the predictor alone
                yield Exchange(lambda transport: transport.check_ready(predictor, timeout_s))
            except ModelNotReadyError:
                raise exc from None

    def _loaded(self, image: ImageSource) -> tuple[Image, str]:
        """The picture and the name of its pixels."""
        picture = load_image(image, self._max_image_pixels)
        return picture, digest(picture)

    def chosen(self, embedding: Embedding | None) -> Embedding:
        """``embedding``, if it is one of this client's, or the image that is set."""
        if embedding is None:
            return self.current()
        self._refuse_closed()
        if not isinstance(embedding, Embedding):
            raise InvalidInputError(
                f"embedding must come from encode(); got {type(embedding).__name__!r}."
            )
        if (embedding.family, embedding.variant) != (self.family.name, self._variant):
            raise InvalidInputError(
                f"This client's decoder is {self.family.decoder.name!r}; the embedding is one of "
                f"model_type {embedding.family!r}, variant {embedding.variant or None!r}."
            )
        return embedding

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ClientClosedError("This client is closed; make a new one.")


def _memory(request: Memory, timeout_s: float | None, transport: Any) -> Any:
    if not hasattr(transport, "memory"):
        raise SharedMemoryError(
            f"embedding='shared-memory' needs a transport with a method memory; "
            f"{type(transport).__name__} has none."
        )
    return transport.memory(request, timeout_s)


def _deadline(timeout_s: float | None) -> Deadline:
    if timeout_s is not None:
        check_timeout(timeout_s)
    return Deadline(timeout_s)


def _left(deadline: Deadline) -> float | None:
    """Never too little to ask with: the transport knows how to say that the time is over."""
    try:
        left = deadline.left()
    except TimeoutError:
        return _SHORTEST_S
    return left
