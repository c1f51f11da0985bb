"""The client for asyncio; what it decides is in :mod:`triton_sam.core`."""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cache import EmbeddingCache
from .core import ClientCore, Where, client_options, server_url
from .flow import run_async
from .images import MAX_IMAGE_PIXELS, ImageSource
from .masks import Segmentation
from .prompts import Prompt
from .protocol import Embedding
from .transport import AsyncTransport, TransportOptions, open_async_transport

if TYPE_CHECKING:
    from typing_extensions import Self


class AsyncSAM2TritonClient:
    """:class:`~triton_sam.client.SAM2TritonClient` for asyncio: same arguments, results and errors.

    Any number of calls may be under way at once. Images are decoded and masks resized in threads,
    so that the event loop goes on. Cancelling the task of a call over gRPC cancels it on the
    server while it waits in the queue there; over HTTP the server carries it out all the same and
    only the answer is dropped.

    A client belongs to the event loop that uses it first; make it inside ``asyncio.run``.
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
        transport: AsyncTransport | None = None,
    ) -> None:
        self._core = ClientCore(model_type, variant, max_image_pixels, cache, embedding, tenant_key)
        self._transport = (
            transport
            if transport is not None
            else open_async_transport(server_url(url), client_options(options, timeout_s))
        )

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) of the image that is set, in pixels, upright."""
        return self._core.current().original_size

    @property
    def embedding(self) -> Embedding:
        """The image that is set, encoded; for ``embedding=`` of this or another client."""
        return self._core.current()

    async def set_image(self, image: ImageSource, *, timeout_s: float | None = None) -> None:
        """Encode an image; the prompts that follow refer to it.

        Of several that are under way the one that was asked for last stays. Calls that have begun
        go on with the image that was set when they began. Otherwise as
        :meth:`SAM2TritonClient.set_image <triton_sam.client.SAM2TritonClient.set_image>`.
        """
        await run_async(self._core.set_image(image, timeout_s), self._transport)

    async def encode(self, image: ImageSource, *, timeout_s: float | None = None) -> Embedding:
        """Encode an image without setting it, to be passed as ``embedding=``."""
        return await run_async(self._core.encode(image, timeout_s), self._transport)

    async def predict(
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
        """Low-resolution logits (B, M, h, w) and scores (B, M).

        As :meth:`SAM2TritonClient.predict <triton_sam.client.SAM2TritonClient.predict>`.
        """
        prompt = partial(
            Prompt.create, point_coords, point_labels, box, mask_input, multimask_output
        )
        return await run_async(self._core.predict(prompt, embedding, timeout_s), self._transport)

    async def segment(
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
        return await run_async(self._core.segment(prompt, embedding, timeout_s), self._transport)

    async def is_ready(self) -> bool:
        """Whether the server answers and serves both models."""
        return await run_async(self._core.is_ready(), self._transport)

    async def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Return as soon as both models are ready.

        Raises :class:`ServerTimeoutError`, with the last reason, after ``timeout_s`` seconds.
        """
        await run_async(self._core.wait_until_ready(timeout_s), self._transport)

    async def close(self) -> None:
        """Give the connections and the image back; calls under way end with an error."""
        if self._core.close():
            await run_async(self._core.take_back(), self._transport)
            await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
