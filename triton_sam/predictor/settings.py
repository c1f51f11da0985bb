"""A predictor's limits, and what it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InvalidInputError
from ..images import MAX_IMAGE_PIXELS

COUNTERS = {
    "store_hits": "Requests for an image that was there",
    "store_misses": "Requests for an image that was not there",
    "store_evictions": "Images that made room for others",
    "store_expired": "Images that nobody had asked for in a long time",
    "encodes": "Runs of the encoder",
    "decodes": "Runs of the decoder",
    "decoded_prompts": "Prompts that those decoded",
    "redis_hits": "Images that were fetched from Redis instead of being encoded",
    "redis_misses": "Images that were looked for in Redis and not there, or damaged",
    "redis_stored": "Images that were written to Redis",
    "redis_failures": "Calls of Redis that failed or took too long",
    "mask_hits": "Requests for masks by name that were all there",
    "mask_misses": "Requests for masks by name of which one was not there",
    "dropped": "Requests that were cancelled or late before they were done",
}
GAUGES = {
    "store_images": "Images that are kept",
    "store_bytes": "Bytes of the images that are kept",
    "mask_bytes": "Bytes of the masks that are kept",
    "waiting": "Requests that wait to be run",
}


@dataclass(frozen=True)
class Settings:
    """Limits of a predictor.

    ``store_bytes``: of all encoded images. ``ttl_s``: how long one is kept after its last use.
    ``mask_bytes``: of the masks that were answered lately, a quarter of a megabyte each.
    ``max_pixels``: of an image. ``max_prompts``, ``max_points``: of a request. ``max_clicks``: of
    one prompt, whose memory grows with their square. ``max_waiting``: requests in each queue.
    ``gather``: prompts that are decoded together; on a processor one, where eight at once take
    longer than one after the other (22 against 19 ms each, SAM 2.1, two cores). A request with more
    of them gives way after each ``gather``; ``max_begun`` prompts are in such requests at a time,
    whose masks so far take memory. ``encoders``: images that are decoded from their files and
    resized at a time. ``redis_url``: of a server where predictors share images; empty: none.
    """

    store_bytes: int = 1 << 30
    ttl_s: float = 3600.0
    mask_bytes: int = 64 << 20
    max_pixels: int = MAX_IMAGE_PIXELS
    max_prompts: int = 1024
    max_points: int = 4096
    max_clicks: int = 512
    max_waiting: int = 1024
    gather: int = 1
    max_begun: int = 1280
    encoders: int = 1
    redis_url: str = ""

    @classmethod
    def read(cls, variables: Mapping[str, str], on_gpu: bool) -> Settings:
        """From the environment, whose variables begin with ``TRITON_SAM_``.

        ``STORE_MB``, ``STORE_TTL_S``, ``STORE_REDIS``, ``QUEUE``.
        Raises :class:`InvalidInputError` for what is no positive number.
        """

        def number(name: str, default: float) -> float:
            text = variables.get(name) or str(default)
            try:
                value = float(text)
            except ValueError:
                value = 0.0
            if not 0 < value < float("inf"):
                raise InvalidInputError(f"{name} is {text!r}, expected a number greater than 0.")
            return value

        return cls(
            store_bytes=int(number("TRITON_SAM_STORE_MB", 4096 if on_gpu else 1024) * 1e6),
            ttl_s=number("TRITON_SAM_STORE_TTL_S", cls.ttl_s),
            max_waiting=int(number("TRITON_SAM_QUEUE", cls.max_waiting)),
            gather=8 if on_gpu else 1,
            # Files are read on the processor, so that a GPU waits for several of them.
            encoders=4 if on_gpu else 1,
            redis_url=variables.get("TRITON_SAM_STORE_REDIS", ""),
        )
