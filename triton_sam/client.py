"""The client: an image once, then as many prompts as there are."""

from __future__ import annotations

import logging
import os
import time
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import (
    ClientClosedError,
    ImageNotSetError,
    ServerError,
    ServerTimeoutError,
)
from .images import MAX_IMAGE_PIXELS, ImageSource, digest, load_image, preprocess
from .masks import Segmentation, clamp, resize_masks
from .prompts import Prompt
from .protocol import (
    Embedding,
    Prediction,
    Served,
    decode_call,
    encode_call,
    read_embedding,
    read_prediction,
)
from .specs import family
from .transport import Transport, open_transport

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

DEFAULT_URL = "localhost:8000"
_POLL_S = 0.2


class SAM2TritonClient:
    """Segments images with a model on a Triton server; the masks are the official predictor's.

    ``url``: ``localhost:8000`` or ``http://…`` (HTTP), ``https://…``, ``grpc://host:8001`` or
    ``grpcs://…``; without it the environment variable ``TRITON_URL``, then ``localhost:8000``.
    ``model_type``: a family of ``FAMILIES``. ``timeout_s``: of each exchange with the server, in
    seconds. ``max_image_pixels``: images with more are refused before they are decoded.
    ``ca_file``: PEM certificates to trust with TLS instead of the system's. ``transport``: another
    way to the server, in place of ``url``, ``timeout_s`` and ``ca_file``.

    Nothing is sent before the first call. One client may be used by several threads; they share
    its image. Raises :class:`InvalidInputError` for arguments that cannot be used, and
    :class:`MissingExtraError` for gRPC without the extra ``grpc``.
    """

    def __init__(
        self,
        url: str | None = None,
        model_type: str = "sam2",
        *,
        timeout_s: float = 60.0,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        ca_file: str | None = None,
        transport: Transport | None = None,
    ) -> None:
        self._family = family(model_type)
        self._max_image_pixels = max_image_pixels
        self._transport = (
            transport
            if transport is not None
            else open_transport(
                url or os.environ.get("TRITON_URL") or DEFAULT_URL,
                timeout_s=timeout_s,
                ca_file=ca_file,
            )
        )
        self._served: dict[str, Served] = {}
        self._embedding: Embedding | None = None
        self._closed = False

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) of the image that is set, in pixels, upright."""
        return self._current().original_size

    def set_image(self, image: ImageSource) -> None:
        """Encode an image; the prompts that follow refer to it.

        ``image``: a path, the bytes of an image file, a ``PIL.Image``, or an array, HxWx3 uint8
        in RGB order or HxW grey. EXIF orientation is applied and transparency is laid on white:
        coordinates and masks belong to the image as a person sees it. When this fails the image
        that was set before stays.

        Raises :class:`ImageError`, or a :class:`ServerError`.
        """
        self._refuse_closed()
        picture = load_image(image, self._max_image_pixels)
        pixels = preprocess(picture, self._family.image)
        started = time.perf_counter()
        call = encode_call(self._family, pixels, self._what_is_served(self._family.encoder.name))
        arrays = self._transport.infer(call)
        self._embedding = read_embedding(
            self._family, call, arrays, (picture.height, picture.width), digest(picture)
        )
        logger.debug("%s took %.1f ms", call.model, 1e3 * (time.perf_counter() - started))

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = False,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Low-resolution masks for one prompt, or for B independent ones in one call.

        ``point_coords``: Nx2, or BxNx2, (x, y) in pixels of the image. ``point_labels``: N, or
        BxN: 1 foreground, 0 background, -1 padding, so that prompts may differ in their number of
        points. ``box``: (x1, y1, x2, y2), or Bx4; what lies outside the image is cut off.
        ``mask_input``: 256x256, 1x256x256 or Bx1x256x256 float logits, as returned before for one
        mask. ``multimask_output``: three masks for each prompt instead of one. Any combination
        will do, as long as something is given and the numbers of prompts agree.

        Returns ``(masks, scores)``: float32 BxMx256x256 logits within ±32, the official
        predictor's ``low_res_masks``; above 0 is foreground. And float32 BxM, the IoU that the
        model expects.

        Raises :class:`PromptError`, :class:`ImageNotSetError`, or a :class:`ServerError`.
        """
        prediction = self._decode(
            self._current(), point_coords, point_labels, box, mask_input, multimask_output
        )
        return clamp(prediction.logits, self._family.prompts.mask_clip), prediction.scores

    def segment(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = False,
    ) -> Segmentation:
        """Masks at the size of the image. Takes and raises what :meth:`predict` does."""
        embedding = self._current()
        prediction = self._decode(
            embedding, point_coords, point_labels, box, mask_input, multimask_output
        )
        return Segmentation(
            # As the official predictor: from the logits before they are clamped.
            masks=resize_masks(prediction.logits, embedding.original_size),
            scores=prediction.scores,
            logits=clamp(prediction.logits, self._family.prompts.mask_clip),
        )

    def is_ready(self) -> bool:
        """Whether the server answers and serves both models."""
        self._refuse_closed()
        try:
            self._transport.check_ready(self._model_names())
        except ServerError as exc:
            logger.debug("not ready: %s", exc)
            return False
        return True

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Return as soon as both models are ready.

        Raises :class:`ServerTimeoutError`, with the last reason, after ``timeout_s`` seconds.
        """
        self._refuse_closed()
        end = time.monotonic() + timeout_s
        while True:
            try:
                # A server that hangs must not hold us longer than we were told to wait.
                left = max(end - time.monotonic(), _POLL_S)
                return self._transport.check_ready(self._model_names(), timeout_s=left)
            except ServerError as exc:
                if time.monotonic() + _POLL_S >= end:
                    raise ServerTimeoutError(f"Not ready within {timeout_s:g} s. {exc}") from exc
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Give the connections and the image back. Closing again does nothing."""
        if not self._closed:
            self._closed = True
            self._embedding = None
            self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _decode(
        self,
        embedding: Embedding,
        point_coords: ArrayLike | None,
        point_labels: ArrayLike | None,
        box: ArrayLike | None,
        mask_input: ArrayLike | None,
        multimask_output: bool,
    ) -> Prediction:
        prompt = Prompt.create(
            point_coords,
            point_labels,
            box,
            mask_input,
            multimask_output,
            original_size=embedding.original_size,
            layout=self._family.prompts,
        )
        served = self._what_is_served(self._family.decoder.name)
        call = decode_call(self._family, embedding, prompt, served)
        started = time.perf_counter()
        prediction = read_prediction(self._family, self._transport.infer(call), prompt)
        logger.debug("%s took %.1f ms", call.model, 1e3 * (time.perf_counter() - started))
        return prediction

    def _what_is_served(self, model: str) -> Served:
        if model not in self._served:
            self._served[model] = self._transport.served(model)
        return self._served[model]

    def _model_names(self) -> list[str]:
        return [model.name for model in self._family.models]

    def _current(self) -> Embedding:
        self._refuse_closed()
        if self._embedding is None:
            raise ImageNotSetError("No image is set; call set_image first.")
        return self._embedding

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ClientClosedError("This client is closed; make a new one.")
