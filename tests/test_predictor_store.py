"""The store of encoded images: never over its budget, never without what is in use."""

from __future__ import annotations

import random
import threading

import numpy as np

from triton_sam.predictor.store import Encoded, Store, image_handle


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def encoded(nbytes: int, height: int = 1) -> Encoded:
    return Encoded({}, (height, 2), nbytes)


def store(max_bytes: int = 100, ttl_s: float = 10.0) -> tuple[Store, Clock]:
    clock = Clock()
    return Store(max_bytes, ttl_s, clock), clock


def test_a_handle_follows_from_what_was_sent_and_the_key() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    handles = [
        image_handle(b"file"),
        image_handle(b"file", b"key"),
        image_handle(b"file", b"another"),
        image_handle(b"other file"),
        image_handle(pixels),
        image_handle(pixels.reshape(1, 4, 3)),
        image_handle(pixels, b"key"),
    ]
    assert len(set(handles)) == len(handles)
    assert all(len(handle) == 32 and int(handle, 16) >= 0 for handle in handles)
    # Clients work these out too, so they must never change.
    assert handles[0] == "683e3e6578645a3d16da70a54f0c30c1"
    assert handles[1] == "450c1fd6e022f659e86d8a4aa489835a"
    assert handles[4] == "425061e87fb6ebc447029d7328310124"
    assert image_handle(np.asfortranarray(pixels)) == image_handle(pixels)


def test_the_least_recently_used_leave_first() -> None:
    kept, _ = store()
    for name in "abc":
        assert kept.put(name, encoded(30))
    assert kept.size_of("a") == (1, 2)
    assert kept.put("d", encoded(30))
    assert [name for name in "abcd" if name in kept] == ["a", "c", "d"]
    stats = kept.stats()
    assert (stats.images, stats.nbytes, stats.evictions, stats.hits) == (3, 90, 1, 1)


def test_the_same_handle_counts_once() -> None:
    kept, _ = store()
    kept.put("a", encoded(60, height=1))
    kept.put("a", encoded(70, height=9))
    assert kept.size_of("a") == (9, 2)
    assert kept.stats().nbytes == 70 and kept.stats().evictions == 0


def test_what_is_in_use_stays() -> None:
    kept, _ = store()
    kept.put("a", encoded(60))
    with kept.pinned("a") as found:
        assert found is not None
        assert not kept.put("b", encoded(60))
        assert "a" in kept and "b" not in kept
    assert kept.put("b", encoded(60))
    assert "a" not in kept


def test_what_nobody_asks_for_expires_and_a_use_counts() -> None:
    kept, clock = store(ttl_s=10)
    kept.put("a", encoded(10))
    kept.put("b", encoded(10))
    clock.now = 8
    assert kept.size_of("a") is not None
    clock.now = 11
    assert "a" in kept and "b" not in kept
    clock.now = 19
    assert kept.size_of("a") is None
    assert (kept.stats().expired, kept.stats().misses, kept.stats().nbytes) == (2, 1, 0)


def test_room_is_made_before_it_is_needed() -> None:
    kept, _ = store()
    for name in "abc":
        kept.put(name, encoded(30))
    with kept.room(50):
        assert kept.stats().nbytes == 30
        assert not kept.put("d", encoded(80))
        assert kept.put("e", encoded(50), reserved=50)
    assert kept.stats().nbytes <= 100


def test_many_threads_never_exceed_the_budget() -> None:
    kept, _ = store(max_bytes=1000)
    worst, wrong = [0], []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(2000):
            number = rng.randrange(50)
            size = 10 + 3 * number
            if rng.random() < 0.5:
                with kept.room(size):
                    kept.put(str(number), encoded(size, height=number), reserved=size)
            with kept.pinned(str(number)) as found:
                if found is not None and found.original_size[0] != number:
                    wrong.append(number)
            worst[0] = max(worst[0], kept.stats().nbytes)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 500 < worst[0] <= 1000
    stats = kept.stats()
    assert stats.images == sum(str(number) in kept for number in range(50))
