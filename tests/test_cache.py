"""The cache: budgets, tiers that fail, and one encoding for callers that come together."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from embeddings import assert_equal, embedding
from hypothesis import given
from hypothesis import strategies as st

from triton_sam.cache import EmbeddingCache, MemoryTier, Tier, TierStats
from triton_sam.cache.tiers import GuardedTier
from triton_sam.embedding import Embedding, EmbeddingKey
from triton_sam.errors import ClientClosedError, InvalidInputError, ServerTimeoutError

SIZE = embedding().nbytes


class FlakyTier(Tier):
    """Memory behind a switch."""

    name = "flaky"

    def __init__(self) -> None:
        self.works = True
        self.calls = 0
        self._memory = MemoryTier()

    def get(self, key: EmbeddingKey) -> Embedding | None:
        self._answer()
        return self._memory.get(key)

    def put(self, embedding: Embedding) -> bool:
        self._answer()
        return self._memory.put(embedding)

    def clear(self) -> None:
        self._memory.clear()

    def stats(self) -> TierStats:
        return self._memory.stats()

    def _answer(self) -> None:
        self.calls += 1
        if not self.works:
            raise ConnectionError("gone away")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def forbidden() -> Embedding:
    raise AssertionError("it was to be found in the cache")


# Memory


def test_memory_drops_what_was_used_longest_ago() -> None:
    memory = MemoryTier(max_bytes=3 * SIZE)
    for seed in range(3):
        assert memory.put(embedding(seed))
    assert_equal(memory.get(embedding(0).key), embedding(0))
    memory.put(embedding(3))
    assert memory.get(embedding(1).key) is None
    assert memory.get(embedding(0).key) is not None
    assert memory.stats() == TierStats("memory", evictions=1, entries=3, nbytes=3 * SIZE)


def test_memory_refuses_what_is_larger_than_its_budget() -> None:
    memory = MemoryTier(max_bytes=SIZE)
    memory.put(embedding(0))
    assert not memory.put(embedding(1, side=32))
    assert memory.get(embedding(0).key) is not None


def test_the_same_image_takes_its_room_once() -> None:
    memory = MemoryTier(max_bytes=2 * SIZE)
    for _ in range(5):
        memory.put(embedding(0))
    assert memory.stats() == TierStats("memory", evictions=0, entries=1, nbytes=SIZE)


@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from([4, 8, 16])), max_size=30))
def test_memory_never_exceeds_its_budget(writes: list[tuple[int, int]]) -> None:
    memory = MemoryTier(max_bytes=2 * SIZE)
    for seed, side in writes:
        memory.put(embedding(seed, side=side))
        held = memory.stats()
        assert held.nbytes is not None and held.nbytes <= 2 * SIZE
        assert memory.get(embedding(seed, side=side).key) is not None


def test_memory_under_threads() -> None:
    memory = MemoryTier(max_bytes=4 * SIZE)

    def use(seed: int) -> None:
        for _ in range(50):
            memory.put(embedding(seed % 7))
            found = memory.get(embedding(seed % 5).key)
            assert found is None or found.digest == f"digest{seed % 5}"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(16)))
    held = memory.stats()
    assert (held.entries, held.nbytes) == (4, 4 * SIZE)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_budget_is_above_zero(limit: int) -> None:
    with pytest.raises(InvalidInputError, match=f"max_bytes must be above 0; got {limit}"):
        MemoryTier(max_bytes=limit)


# Tiers


def test_a_hit_in_a_lower_tier_fills_the_upper_ones() -> None:
    upper, middle, lower = MemoryTier(), MemoryTier(), FlakyTier()
    lower.put(embedding())
    cache = EmbeddingCache(upper, middle, lower)
    assert_equal(cache.get_or_encode(embedding().key, forbidden), embedding())
    assert upper.get(embedding().key) is not None
    assert middle.get(embedding().key) is not None
    calls = lower.calls
    assert_equal(cache.get(embedding().key), embedding())
    assert lower.calls == calls


def test_another_version_or_variant_is_another_entry() -> None:
    cache = EmbeddingCache(MemoryTier())
    cache.put(embedding(version="1"))
    assert cache.get(embedding(version="2").key) is None
    assert_equal(cache.get(embedding(version="1").key), embedding(version="1"))


def test_what_was_encoded_is_in_every_tier() -> None:
    upper, lower = MemoryTier(), FlakyTier()
    cache = EmbeddingCache(upper, lower)
    cache.get_or_encode(embedding().key, embedding)
    assert_equal(upper.get(embedding().key), embedding())
    assert_equal(lower.get(embedding().key), embedding())
    cache.clear()
    assert cache.get(embedding().key) is None


def test_the_statistics_count() -> None:
    cache = EmbeddingCache(MemoryTier(2 * SIZE), FlakyTier())
    for seed in (0, 0, 1, 2, 0):
        cache.get_or_encode(embedding(seed).key, partial(embedding, seed))
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.encoded, stats.shared) == (2, 3, 3, 0)
    memory, flaky = stats.tiers
    assert memory == TierStats(
        "memory", hits=1, misses=4, stored=4, evictions=2, entries=2, nbytes=2 * SIZE
    )
    assert (flaky.hits, flaky.misses, flaky.stored, flaky.entries) == (1, 3, 3, 3)


def test_an_encoder_that_returns_another_image_is_refused() -> None:
    cache = EmbeddingCache(MemoryTier())
    with pytest.raises(InvalidInputError, match=r"digest0.*digest1"):
        cache.get_or_encode(embedding(0).key, lambda: embedding(1))
    assert cache.get(embedding(0).key) is None
    assert cache.get(embedding(1).key) is None


def test_a_failing_tier_is_logged_once_left_out_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    flaky, clock = FlakyTier(), Clock()
    guarded = GuardedTier(flaky, retry_s=30, clock=clock)
    guarded.put(embedding())
    flaky.works = False
    with caplog.at_level(logging.INFO, "triton_sam"):
        for _ in range(10):
            assert guarded.get(embedding().key) is None
    assert flaky.calls == 2
    assert [record.getMessage() for record in caplog.records] == [
        "cannot read the flaky cache, left out for 30 s: gone away"
    ]
    flaky.works = True
    clock.now += 29
    assert guarded.get(embedding().key) is None
    clock.now += 2
    with caplog.at_level(logging.INFO, "triton_sam"):
        assert_equal(guarded.get(embedding().key), embedding())
    assert caplog.records[-1].getMessage() == "the flaky cache works again (read)"
    stats = guarded.stats()
    assert (stats.hits, stats.misses, stats.errors) == (1, 11, 1)


def test_a_tier_that_cannot_write_can_still_be_read() -> None:
    flaky = FlakyTier()
    guarded = GuardedTier(flaky)
    guarded.put(embedding())
    flaky.works = False
    guarded.put(embedding(1))
    flaky.works = True
    assert guarded.get(embedding().key) is not None


def test_a_failing_tier_is_never_fatal() -> None:
    flaky = FlakyTier()
    flaky.works = False
    cache = EmbeddingCache(flaky, MemoryTier())
    assert_equal(cache.get_or_encode(embedding().key, embedding), embedding())
    assert_equal(cache.get_or_encode(embedding().key, forbidden), embedding())
    assert cache.stats().tiers[0].errors == 2


# Together: the same cases for threads and for tasks.


def in_threads(cache: EmbeddingCache, count: int, encode: Callable[[], Embedding]) -> list[Any]:
    def call(_: int) -> Embedding | BaseException:
        try:
            return cache.get_or_encode(embedding().key, encode)
        except ServerTimeoutError as exc:
            return exc

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


def in_tasks(cache: EmbeddingCache, count: int, encode: Callable[[], Embedding]) -> list[Any]:
    async def encode_async() -> Embedding:
        return await asyncio.to_thread(encode)

    async def run() -> list[Any]:
        calls = [cache.get_or_encode_async(embedding().key, encode_async) for _ in range(count)]
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


def waiting_for(cache: EmbeddingCache, waiters: int) -> Callable[[], None]:
    """Return once that many callers wait for the one that encodes."""

    def wait() -> None:
        deadline = threading.Event()
        flights = cache._flights
        for _ in range(500):
            if sum(flight.waiting for flight in flights.under_way()) >= waiters:
                return
            deadline.wait(0.01)
        raise AssertionError("the callers never came together")

    return wait


@pytest.mark.parametrize("together", [in_threads, in_tasks])
@pytest.mark.parametrize("tiers", [0, 1], ids=["no tier", "memory"])
def test_callers_of_the_same_image_encode_once(together: Any, tiers: int) -> None:
    cache = EmbeddingCache(*[MemoryTier() for _ in range(tiers)])
    wait = waiting_for(cache, 7)
    encoded = []

    def encode() -> Embedding:
        wait()
        encoded.append(1)
        return embedding()

    for found in together(cache, 8, encode):
        assert_equal(found, embedding())
    assert len(encoded) == 1
    stats = cache.stats()
    assert (stats.encoded, stats.shared) == (1, 7)


@pytest.mark.parametrize("together", [in_threads, in_tasks])
def test_the_error_of_one_is_the_error_of_all_and_is_forgotten(together: Any) -> None:
    cache = EmbeddingCache(MemoryTier())
    wait = waiting_for(cache, 3)

    def fail() -> Embedding:
        wait()
        raise ServerTimeoutError("no answer")

    assert [str(exc) for exc in together(cache, 4, fail)] == ["no answer"] * 4
    assert_equal(cache.get_or_encode(embedding().key, embedding), embedding())


def test_a_thread_and_a_task_share_an_encoding() -> None:
    cache = EmbeddingCache()
    wait = waiting_for(cache, 1)

    def encode() -> Embedding:
        wait()
        return embedding()

    async def never() -> Embedding:
        raise AssertionError("the thread encodes")

    async def run() -> None:
        first = asyncio.create_task(asyncio.to_thread(cache.get_or_encode, embedding().key, encode))
        while not cache._flights.under_way():
            await asyncio.sleep(0.001)
        assert_equal(await cache.get_or_encode_async(embedding().key, never), embedding())
        assert_equal(await first, embedding())

    asyncio.run(run())


def test_a_cancelled_task_hands_over_to_one_that_waits() -> None:
    cache = EmbeddingCache(MemoryTier())
    begun = []

    async def slow() -> Embedding:
        begun.append("slow")
        await asyncio.sleep(60)
        return embedding()

    async def quick() -> Embedding:
        begun.append("quick")
        return embedding()

    async def run() -> None:
        first = asyncio.create_task(cache.get_or_encode_async(embedding().key, slow))
        await asyncio.sleep(0)
        others = [
            asyncio.create_task(cache.get_or_encode_async(embedding().key, quick)) for _ in range(3)
        ]
        await asyncio.sleep(0.01)
        first.cancel()
        for found in await asyncio.gather(*others):
            assert_equal(found, embedding())
        assert first.cancelled()

    asyncio.run(run())
    assert begun == ["slow", "quick"]


def test_one_that_waits_can_be_cancelled_alone() -> None:
    cache = EmbeddingCache(MemoryTier())

    async def run() -> None:
        done = asyncio.Event()

        async def encode() -> Embedding:
            await done.wait()
            return embedding()

        first, second, third = (
            asyncio.create_task(cache.get_or_encode_async(embedding().key, encode))
            for _ in range(3)
        )
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.sleep(0.01)
        assert second.cancelled()
        done.set()
        assert_equal(await first, embedding())
        assert_equal(await third, embedding())

    asyncio.run(run())


def test_a_client_that_is_closed_hands_over() -> None:
    cache = EmbeddingCache(MemoryTier())
    wait = waiting_for(cache, 1)
    results: list[object] = []

    def closed() -> Embedding:
        wait()
        raise ClientClosedError("closed")

    def first() -> None:
        with pytest.raises(ClientClosedError):
            cache.get_or_encode(embedding().key, closed)

    leader = threading.Thread(target=first)
    leader.start()
    while not cache._flights.under_way():
        pass
    results.append(cache.get_or_encode(embedding().key, embedding))
    leader.join()
    assert_equal(results[0], embedding())  # type: ignore[arg-type]


def test_a_blocking_call_inside_the_event_loop_does_not_wait_for_its_own_thread() -> None:
    cache = EmbeddingCache(MemoryTier())

    async def run() -> None:
        async def encode() -> Embedding:
            assert_equal(cache.get_or_encode(embedding().key, embedding), embedding())
            return embedding()

        await asyncio.wait_for(cache.get_or_encode_async(embedding().key, encode), 5)

    asyncio.run(run())
