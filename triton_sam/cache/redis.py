"""Embeddings in a Redis or Valkey server, which several machines may share."""

from __future__ import annotations

import logging
import re
import threading
from typing import TYPE_CHECKING, cast

from ..embedding import Embedding, EmbeddingKey
from ..errors import EmbeddingError, InvalidInputError, MissingExtraError
from .budget import positive
from .compression import check_compression, compress, decompress
from .tiers import Tier, TierStats

if TYPE_CHECKING:
    import redis

logger = logging.getLogger(__name__)


class RedisTier(Tier):
    """Keeps embeddings in a Redis or Valkey server, each for ``ttl_s`` seconds after its last use.

    ``url``: ``redis://[user:password@]host:port/db``, ``rediss://`` with TLS, ``unix://path``;
    ``valkey://`` and ``valkeys://`` mean the same. ``max_entry_bytes``: larger ones are not sent.
    ``float16``: half the bytes, at the cost of masks that differ slightly. ``compress``: about a
    fifth less for some 40 ms. ``timeout_s``: of connecting and of each exchange. ``prefix``:
    begins the name of every key. How much it keeps in all is the server's ``maxmemory``.

    Nothing is sent yet. Raises :class:`InvalidInputError` for what cannot be used and
    :class:`MissingExtraError` without the extra ``redis``.
    """

    name = "redis"

    def __init__(
        self,
        url: str = "redis://localhost:6379/0",
        *,
        ttl_s: float = 86_400.0,
        max_entry_bytes: int = 64 << 20,
        float16: bool = False,
        compress: bool = False,
        timeout_s: float = 2.0,
        prefix: str = "triton-sam:",
    ) -> None:
        self._ttl_ms = max(1, round(1e3 * positive("ttl_s", ttl_s)))
        self._max_entry_bytes = positive("max_entry_bytes", max_entry_bytes)
        self._float16, self._compress, self._prefix = float16, compress, prefix
        if compress:
            check_compression()
        self._redis = _connect(url, positive("timeout_s", timeout_s))
        self._damaged = 0
        self._lock = threading.Lock()

    def get(self, key: EmbeddingKey) -> Embedding | None:
        name = self._prefix + key.name
        content = cast("bytes | None", self._redis.getex(name, px=self._ttl_ms))
        if content is None:
            return None
        try:
            embedding = Embedding.from_bytes(decompress(content), name=name)
            if embedding.key != key:
                raise EmbeddingError(f"{name} holds another embedding than its name says.")
        except EmbeddingError as exc:
            self._drop_damaged(name, exc)
            return None
        return embedding

    def put(self, embedding: Embedding) -> bool:
        content = embedding.to_bytes(float16=self._float16)
        if self._compress:
            content = compress(content, width=2 if self._float16 else 4)
        if len(content) > self._max_entry_bytes:
            return False
        self._redis.set(self._prefix + embedding.key.name, content, px=self._ttl_ms)
        return True

    def clear(self) -> None:
        # The prefix as it is, not as the pattern that it may look like, and a key's name.
        ours = re.sub(r"([\\*?\[\]])", r"\\\1", self._prefix) + "[0-9a-f]" * 40
        for name in self._redis.scan_iter(match=ours, count=1000):
            self._redis.unlink(name)

    def stats(self) -> TierStats:
        return TierStats(self.name, damaged=self._damaged)

    def close(self) -> None:
        self._redis.close()

    def _drop_damaged(self, name: str, exc: EmbeddingError) -> None:
        logger.warning("dropped a damaged entry of the redis cache: %s", exc)
        with self._lock:
            self._damaged += 1
        self._redis.unlink(name)


def _connect(url: str, timeout_s: float) -> redis.Redis:
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as exc:
        raise MissingExtraError(
            "A Redis cache needs the redis package: pip install 'triton-sam[redis]'"
        ) from exc
    try:
        return redis.Redis.from_url(
            url.replace("valkey", "redis", 1) if url.startswith("valkey") else url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            # Once more without waiting: a connection that idled while the server restarted is
            # dead. The default backs off for seconds, and a cache must not be waited for.
            retry=Retry(NoBackoff(), 1),
        )
    except ValueError as exc:
        raise InvalidInputError(
            f"Cannot use the Redis URL: {exc} Write redis://host:6379/0."
        ) from exc
