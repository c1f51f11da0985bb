"""The client: an image once, then as many prompts as there are."""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cache import EmbeddingCache
from .core import ClientCore, Where, client_options, server_url
from .flow import run
from .images import MAX_IMAGE_PIXELS, ImageSource
from .masks import Segmentation
from .prompts import Prompt
from .protocol import Embedding
from .transport import Transport, TransportOptions, open_transport

if TYPE_CHECKING:
    from typing_extensions import Self


class SAM2TritonClient:
    """Segments images with a model on a Triton server; the masks are the official predictor's.

    ``url``: ``localhost:8000`` or ``http://…`` (HTTP), ``https://…``, ``grpc://host:8001`` or
    ``grpcs://…``; without it the environment variable ``TRITON_URL``, then ``localhost:8000``.
    ``model_type``: a family of ``FAMILIES``. ``variant``: one of the family's variants that is
    served beside its default. ``timeout_s``: of each exchange with the server, in seconds,
    retries included; 60 unless ``options`` say otherwise. ``max_image_pixels``: images
    with more are refused before they are decoded. ``options``: certificates, headers, compression
    and retries, :class:`TransportOptions`. ``embedding``: where encoded images are kept. With
    ``server`` the image's own file is sent, a click sends a handle and its points, and the server
    is sent the image again when it has forgotten it; ``client`` brings the embedding here and
    sends it with every click; ``shared-memory`` has the pair put it into memory that this client
    and a server on the same machine share; ``auto`` is the server where it has the family's
    predictor and no ``cache`` is given. ``tenant_key``: a secret without which nobody finds these
    images on the server, not even with the same image. ``cache``: where embeddings are looked up
    and kept, :class:`~triton_sam.cache.EmbeddingCache`; it may be shared between clients and is not
    closed with them. ``transport``: another way to the server, in place of ``url``, ``timeout_s``
    and ``options``.

    Nothing is sent before the first call. One client may be used by several threads; they share
    its image. Raises :class:`InvalidInputError` for arguments that cannot be used, and
    :class:`MissingExtraError` for gRPC without the extra ``grpc``.
    """

    def __init__(
        self,
        url: str | None = None,
        model_type: str = "sam2",
        *,
        variant: str | None = None,
        timeout_s: float | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        options: TransportOptions | None = None,
        embedding: Where = "auto",
        tenant_key: str | bytes = b"",
        cache: EmbeddingCache | None = None,
        transport: Transport | None = None,
    ) -> None:
        self._core = ClientCore(model_type, variant, max_image_pixels, cache, embedding, tenant_key)
        self._transport = (
            transport
            if transport is not None
            else open_transport(server_url(url), client_options(options, timeout_s))
        )

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) of the image that is set, in pixels, upright."""
        return self._core.current().original_size

    @property
    def embedding(self) -> Embedding:
        """The image that is set, encoded; for ``embedding=`` of this or another client."""
        return self._core.current()

    def set_image(self, image: ImageSource, *, timeout_s: float | None = None) -> None:
        """Encode an image; the prompts that follow refer to it.

        ``image``: a path, the bytes of an image file, a ``PIL.Image``, or an array, HxWx3 uint8
        in RGB order or HxW grey. EXIF orientation is applied and transparency is laid on white:
        coordinates and masks belong to the image as a person sees it. When this fails the image
        that was set before stays. ``timeout_s``: for this call as a whole.

        Raises :class:`ImageError`, or a :class:`ServerError`.
        """
        run(self._core.set_image(image, timeout_s), self._transport)

    def encode(self, image: ImageSource, *, timeout_s: float | None = None) -> Embedding:
        """Encode an image without setting it; takes and raises what :meth:`set_image` does.

        The embedding goes to ``predict(…, embedding=…)`` and ``segment(…, embedding=…)`` of this
        client or of another one with the same ``model_type``.
        """
        return run(self._core.encode(image, timeout_s), self._transport)

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = False,
        *,
        embedding: Embedding | None = None,
        timeout_s: float | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Low-resolution masks for one prompt, or for B independent ones in one call.

        ``point_coords``: Nx2, or BxNx2, (x, y) in pixels of the image. ``point_labels``: N, or
        BxN: 1 foreground, 0 background, -1 padding, so that prompts may differ in their number of
        points. ``box``: (x1, y1, x2, y2), or Bx4; what lies outside the image is cut off.
        ``mask_input``: hxw, 1xhxw or Bx1xhxw float logits, as returned before for one mask.
        ``multimask_output``: three masks for each prompt instead of one. Any combination will do,
        as long as something is given and the numbers of prompts agree. ``embedding``: of another
        image than the one that is set, from :meth:`encode`. ``timeout_s``: for this call as a
        whole.

        Returns ``(masks, scores)``: float32 BxMxhxw logits, the official predictor's
        ``low_res_masks`` (256x256, of SAM 2 within ±32; 288x288 of SAM 3); above 0 is
        foreground. And float32 BxM, the IoU that the model expects.

        Raises :class:`PromptError`, :class:`ImageNotSetError`, or a :class:`ServerError`.
        """
        prompt = partial(
            Prompt.create, point_coords, point_labels, box, mask_input, multimask_output
        )
        return run(self._core.predict(prompt, embedding, timeout_s), self._transport)

    def segment(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = False,
        *,
        embedding: Embedding | None = None,
        timeout_s: float | None = None,
    ) -> Segmentation:
        """Masks at the size of the image. Takes and raises what :meth:`predict` does."""
        prompt = partial(
            Prompt.create, point_coords, point_labels, box, mask_input, multimask_output
        )
        return run(self._core.segment(prompt, embedding, timeout_s), self._transport)

    def is_ready(self) -> bool:
        """Whether the server answers and serves both models."""
        return run(self._core.is_ready(), self._transport)

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Return as soon as both models are ready.

        Raises :class:`ServerTimeoutError`, with the last reason, after ``timeout_s`` seconds.
        """
        run(self._core.wait_until_ready(timeout_s), self._transport)

    def close(self) -> None:
        """Give the connections and the image back. Closing again does nothing."""
        if self._core.close():
            run(self._core.take_back(), self._transport)
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
