"""Encoded images in Redis or Valkey, which several predictors share: fetched instead of encoded.

Imported where ``TRITON_SAM_STORE_REDIS`` is set alone: it needs the packages redis and safetensors.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache.redis import RedisTier
from .cache.tiers import GuardedTier, Tier
from .embedding import Embedding, EmbeddingKey
from .errors import MissingExtraError
from .files import sha256
from .predictor.store import Encoded
from .repository import graph_files
from .specs import Family

# To be raised when what is kept of an image by the same pair changes.
_FORM = 1
_PREFIX = "triton-sam-store:"
# Of each exchange, which is tried twice; and of a look-up as a whole.
_TIMEOUT_S = 1.0
_LIMIT_S = 2.0
_THREADS = 4
# Images that wait to be written; their memory is not the store's any more.
_MAX_WRITES = 4
# An embedding's bytes give float16 back as float32, so it travels as whole numbers.
_HALF = ":float16"


class SharedStore:
    """A tier behind the store of a predictor. Never raises, and answers in two seconds.

    ``version``: of the pair (:func:`pair_version`): others never see its images. ``hold``: takes an
    array to the device that decodes. ``make_way``: called once in each thread that writes.
    ``limit_s``: of a look-up, from when it was asked for.
    """

    def __init__(
        self,
        tier: Tier,
        family: Family,
        version: str,
        hold: Callable[[NDArray[Any]], Any],
        make_way: Callable[[], None] = lambda: None,
        limit_s: float = _LIMIT_S,
    ) -> None:
        self._tier = GuardedTier(tier)
        self._family, self._version, self._hold = family, version, hold
        self._limit_s = limit_s
        self._reading = ThreadPoolExecutor(_THREADS, "fetch")
        self._writing = ThreadPoolExecutor(1, "share", initializer=make_way)
        self._lock = threading.Lock()
        self._writes = self._failures = 0

    @classmethod
    def open(
        cls,
        url: str,
        ttl_s: float,
        family: Family,
        root: Path,
        hold: Callable[[NDArray[Any]], Any],
        make_way: Callable[[], None],
    ) -> SharedStore:
        """In the server at ``url``, for the pair in the repository ``root``; connects later.

        Raises :class:`InvalidInputError` for a URL that cannot be used and
        :class:`MissingExtraError` without the packages.
        """
        if find_spec("safetensors") is None:
            raise MissingExtraError(
                "TRITON_SAM_STORE_REDIS needs the packages redis and safetensors: "
                "pip install redis safetensors, or build the image from the Dockerfile."
            )
        tier = RedisTier(url, ttl_s=ttl_s, timeout_s=_TIMEOUT_S, prefix=_PREFIX)
        return cls(tier, family, pair_version(root, family), hold, make_way)

    def get(self, handle: str, since: float | None = None) -> Encoded | None:
        """The image, if it is there and comes in time; ``since``: on the monotonic clock."""
        asked = time.monotonic() if since is None else since
        left = asked + self._limit_s - time.monotonic()
        try:
            if left > 0:
                return self._reading.submit(self._get, handle).result(left)
        except LateError:
            pass
        with self._lock:
            self._failures += 1
        return None

    def put(self, handle: str, encoded: Encoded) -> None:
        """Have the image written, in another thread; not where too many wait for that."""
        with self._lock:
            if self._writes >= _MAX_WRITES:
                return
            self._writes += 1
        self._writing.submit(self._put, handle, encoded).add_done_callback(self._written)

    def counts(self) -> dict[str, int]:
        """Look-ups that found something or nothing, images written, and calls that failed."""
        stats = self._tier.stats()
        return {
            "redis_hits": stats.hits,
            "redis_misses": stats.misses,
            "redis_stored": stats.stored,
            "redis_failures": stats.errors + self._failures,
        }

    def close(self) -> None:
        """Write what is being written, and give the connections back."""
        self._writing.shutdown(cancel_futures=True)
        self._reading.shutdown(cancel_futures=True)
        self._tier.close()

    def _key(self, handle: str) -> EmbeddingKey:
        return EmbeddingKey(handle, self._family.name, self._family.served_variant, self._version)

    def _get(self, handle: str) -> Encoded | None:
        found = self._tier.get(self._key(handle))
        if found is None:
            return None
        tensors = dict(_unpacked(name, array) for name, array in found.tensors.items())
        nbytes = sum(array.nbytes for array in tensors.values())
        held = {name: self._hold(array) for name, array in tensors.items()}
        return Encoded(held, found.original_size, nbytes)

    def _put(self, handle: str, encoded: Encoded) -> None:
        tensors = dict(_packed(name, value) for name, value in encoded.tensors.items())
        key = asdict(self._key(handle))
        self._tier.put(Embedding(tensors, encoded.original_size, **key))

    def _written(self, done: Future[None]) -> None:
        with self._lock:
            self._writes -= 1
            self._failures += not done.cancelled() and done.exception() is not None


def pair_version(root: Path, family: Family) -> str:
    """What tells the pair in ``root`` from any other: 32 hex digits of its files' content."""
    hashes: dict[str, Any] = {"form": _FORM}
    for model in family.models:
        folder = root / model.name / "1"
        names = (model.file, model.data_file, *graph_files(family, model))
        files = [folder / name for name in names]
        hashes[model.name] = [sha256(file) for file in files if file.exists()]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:32]


def _packed(name: str, value: Any) -> tuple[str, NDArray[Any]]:
    array = value if isinstance(value, np.ndarray) else value.numpy()
    return (name + _HALF, array.view(np.uint16)) if array.dtype == np.float16 else (name, array)


def _unpacked(name: str, array: NDArray[Any]) -> tuple[str, NDArray[Any]]:
    if not name.endswith(_HALF):
        return name, array
    return name.removesuffix(_HALF), array.view(np.float16)
