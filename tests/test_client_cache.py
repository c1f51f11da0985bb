"""Both clients with a cache: one encoding an image, and never another model's embedding."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faces import FACES, AsyncFace
from fakes import FakeTransport, answer, photo
from PIL import Image
from test_client import open_client

from triton_sam import (
    AsyncSAM2TritonClient,
    InferenceError,
    SAM2TritonClient,
    ServerTimeoutError,
)
from triton_sam.cache import DiskTier, EmbeddingCache, MemoryTier
from triton_sam.embedding import Embedding
from triton_sam.protocol import Arrays, Call
from triton_sam.specs import FAMILIES, Family


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(FAMILIES.values()), ids=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


SAM2 = FAMILIES["sam2"]


def fake(family: Family = SAM2, answering: Callable[[Family, Call], Arrays] = answer) -> Any:
    return FakeTransport(family, lambda call: answering(family, call))


def encodings(transport: FakeTransport, family: Family = SAM2) -> int:
    return sum(call.model == family.encoder.name for call in transport.calls)


def opened(
    face: str, transport: FakeTransport, cache: EmbeddingCache | None, **options: Any
) -> Any:
    return open_client(face, transport, cache=cache, **options)


def test_the_same_image_is_encoded_once(face: str, family: Family) -> None:
    transport, cache = fake(family), EmbeddingCache(MemoryTier())
    with opened(face, transport, cache, model_type=family.name) as client:
        client.set_image(photo())
        first = client.predict([[100, 100]], [1])
        client.set_image(photo(seed=1))
        client.set_image(Image.fromarray(photo()))
        np.testing.assert_array_equal(client.predict([[100, 100]], [1])[0], first[0])
        assert client.original_size == (300, 400)
    assert encodings(transport, family) == 2
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.encoded) == (1, 2, 2)


def test_clients_and_programs_share_what_is_on_disk(face: str, tmp_path: Path) -> None:
    for number in range(2):
        transport = fake()
        cache = EmbeddingCache(MemoryTier(), DiskTier(tmp_path))
        with opened(face, transport, cache) as client:
            client.set_image(photo())
            mask = client.segment([[100, 120]], [1]).masks[0, 0]
        assert mask[120, 100] and not mask[280, 380]
        assert encodings(transport) == 1 - number


def test_another_model_of_the_same_name_finds_nothing(face: str, tmp_path: Path) -> None:
    def retrained(family: Family, call: Call) -> Arrays:
        arrays = dict(answer(family, call))
        if call.model == family.decoder.name:
            arrays[family.masks] = arrays[family.masks] - np.float32(5)
        return arrays

    for answering in (answer, retrained):
        transport = fake(answering=answering)
        with opened(face, transport, EmbeddingCache(DiskTier(tmp_path))) as client:
            client.set_image(photo())
            assert len(client.embedding.model_version) == 16
        assert encodings(transport) == 1


def test_a_model_is_asked_once_what_it_is_and_again_after_an_error(face: str) -> None:
    transport = fake()
    with opened(face, transport, EmbeddingCache(MemoryTier())) as client:
        for seed in range(3):
            client.set_image(photo(seed=seed))
        assert [call.model for call in transport.calls].count(SAM2.decoder.name) == 1

        def broken(call: Call) -> Arrays:
            raise InferenceError("restarted")

        works, transport.answer = transport.answer, broken
        with pytest.raises(InferenceError):
            client.predict([[1, 1]], [1])
        transport.answer = works
        client.set_image(photo())
        assert [call.model for call in transport.calls].count(SAM2.decoder.name) == 3
    assert encodings(transport) == 3


def test_a_model_swapped_while_it_serves_is_noticed(face: str) -> None:
    transport, swapped = fake(), False

    def serve(call: Call) -> Arrays:
        arrays = dict(answer(SAM2, call))
        if swapped and call.model == SAM2.decoder.name:
            arrays[SAM2.masks] = arrays[SAM2.masks] - np.float32(5)
        return arrays

    transport.answer = serve
    with opened(face, transport, EmbeddingCache(MemoryTier())) as client:
        client.set_image(photo())
        before = client.embedding.model_version
        swapped = True
        client.set_image(photo())  # not asked again so soon
        assert (encodings(transport), client.embedding.model_version) == (1, before)
        client._core._fingerprint_end -= 10
        client.set_image(photo())
        assert encodings(transport) == 2 and client.embedding.model_version != before
        swapped = False
        client._core._fingerprint_end -= 10
        client.set_image(photo())  # the old one is back, and its embedding is still there
        assert (encodings(transport), client.embedding.model_version) == (2, before)


def test_without_an_answer_of_the_decoder_the_cache_is_left_out(
    face: str, caplog: pytest.LogCaptureFixture
) -> None:
    def encoder_only(family: Family, call: Call) -> Arrays:
        if call.model == family.decoder.name:
            raise InferenceError("no decoder here")
        return answer(family, call)

    transport, cache = fake(answering=encoder_only), EmbeddingCache(MemoryTier())
    with opened(face, transport, cache) as client:
        client.set_image(photo())
        client.set_image(photo())
    assert encodings(transport) == 2
    assert cache.stats().tiers[0].entries == 0
    assert "the decoder does not answer: no decoder here" in caplog.text


def test_without_a_cache_the_decoder_is_not_asked_and_nothing_is_kept(face: str) -> None:
    transport = fake()
    with opened(face, transport, None) as client:
        client.set_image(photo())
        client.set_image(photo())
    assert [call.model for call in transport.calls] == [SAM2.encoder.name] * 2


def test_an_embedding_saved_by_one_client_serves_another(face: str, tmp_path: Path) -> None:
    with opened(face, fake(), None) as client:
        client.set_image(photo())
        client.embedding.save(tmp_path / "photo.safetensors")
        expected = client.predict([[100, 100]], [1])
    transport = fake()
    with opened(face, transport, None) as client:
        kept = Embedding.load(tmp_path / "photo.safetensors")
        masks, scores = client.predict([[100, 100]], [1], embedding=kept)
    np.testing.assert_array_equal(masks, expected[0])
    np.testing.assert_array_equal(scores, expected[1])
    assert encodings(transport) == 0


class SlowTransport(FakeTransport):
    """Encodes until so many others wait for it, and for as long as it is told to."""

    def __init__(self, seconds: float = 0.0, waiters: int = 0) -> None:
        super().__init__(SAM2, lambda call: answer(SAM2, call))
        self.seconds, self.waiters = seconds, waiters
        self.encoding = threading.Event()
        self.cache: EmbeddingCache | None = None

    def waited_for(self) -> bool:
        flights = [] if self.cache is None else self.cache._flights.under_way()
        return sum(flight.waiting for flight in flights) >= self.waiters

    def infer(self, call: Call, timeout_s: float | None = None) -> Arrays:
        if call.model == SAM2.encoder.name:
            self.encoding.set()
            time.sleep(self.seconds)
            for _ in range(1000):
                if self.waited_for():
                    break
                time.sleep(0.01)
        return super().infer(call, timeout_s)


class SlowAsyncTransport(AsyncFace):
    """The same for asyncio."""

    def __init__(self, waiters: int) -> None:
        self.inner = SlowTransport(waiters=waiters)
        self.encoding_task: asyncio.Task[Any] | None = None
        super().__init__(self.inner)

    async def infer(self, call: Call, timeout_s: float | None = None) -> Arrays:
        if call.model == SAM2.encoder.name:
            self.encoding_task = asyncio.current_task()
        while call.model == SAM2.encoder.name and not self.inner.waited_for():
            await asyncio.sleep(0.01)
        return self.inner.infer(call, timeout_s)


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_threads_with_the_same_image_encode_once(cached: bool) -> None:
    transport = SlowTransport(waiters=3)
    cache = EmbeddingCache(MemoryTier()) if cached else None
    with SAM2TritonClient(transport=transport, cache=cache) as client:
        transport.cache = client._core._cache
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: client.set_image(photo()), range(4)))
        assert client.original_size == (300, 400)
    assert encodings(transport) == 1


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_tasks_with_the_same_image_encode_once(cached: bool) -> None:
    async def run() -> int:
        transport = SlowAsyncTransport(waiters=3)
        cache = EmbeddingCache(MemoryTier()) if cached else None
        async with AsyncSAM2TritonClient(transport=transport, cache=cache) as client:
            transport.inner.cache = client._core._cache
            await asyncio.gather(*(client.set_image(photo()) for _ in range(4)))
            assert client.original_size == (300, 400)
        return encodings(transport.inner)

    assert asyncio.run(run()) == 1


def test_two_clients_with_one_cache_encode_once() -> None:
    cache = EmbeddingCache(MemoryTier())
    slow, idle = SlowTransport(waiters=1), SlowTransport()
    slow.cache = cache
    with (
        SAM2TritonClient(transport=slow, cache=cache) as first,
        SAM2TritonClient(transport=idle, cache=cache) as second,
        ThreadPoolExecutor(1) as pool,
    ):
        begun = pool.submit(first.encode, photo())
        assert slow.encoding.wait(5)
        assert second.encode(photo()) is begun.result()
    assert (encodings(slow), encodings(idle)) == (1, 0)


def test_a_cancelled_encoding_is_taken_over() -> None:
    async def run() -> int:
        transport = SlowAsyncTransport(waiters=1000)
        async with AsyncSAM2TritonClient(transport=transport) as client:
            transport.inner.cache = cache = client._core._cache
            tasks = [asyncio.create_task(client.encode(photo())) for _ in range(3)]
            while not any(flight.waiting == 2 for flight in cache._flights.under_way()):
                await asyncio.sleep(0.01)
            while (leader := transport.encoding_task) is None:
                await asyncio.sleep(0.01)
            transport.inner.waiters = 1
            leader.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, asyncio.CancelledError) for result in results].count(True) == 1
        assert sum(isinstance(result, Embedding) for result in results) == 2
        return encodings(transport.inner)

    assert asyncio.run(run()) == 1


def test_waiting_for_another_call_ends_in_time() -> None:
    transport = SlowTransport(3)
    with SAM2TritonClient(transport=transport) as client, ThreadPoolExecutor(1) as pool:
        begun = pool.submit(client.encode, photo())
        assert transport.encoding.wait(5)
        started = time.monotonic()
        with pytest.raises(ServerTimeoutError, match="another call still encodes the same image"):
            client.encode(photo(), timeout_s=0.3)
        assert time.monotonic() - started < 2.5
        assert begun.result().original_size == (300, 400)


def test_the_short_limit_of_one_call_is_not_the_others() -> None:
    class Impatient(SlowTransport):
        def infer(self, call: Call, timeout_s: float | None = None) -> Arrays:
            arrays = super().infer(call, timeout_s)
            if timeout_s is not None:
                raise ServerTimeoutError("too slow")
            return arrays

    transport = Impatient(0.3)
    with SAM2TritonClient(transport=transport) as client, ThreadPoolExecutor(1) as pool:
        begun = pool.submit(client.encode, photo(), timeout_s=5)
        assert transport.encoding.wait(5)
        assert client.encode(photo()).original_size == (300, 400)
        with pytest.raises(ServerTimeoutError, match="too slow"):
            begun.result()


def test_a_segmentation_knows_its_picture(face: str) -> None:
    with opened(face, fake(), None) as client:
        client.set_image(np.full((300, 400, 3), 90, np.uint8))
        found = client.segment([[100, 120]], [1])
        other = client.segment([[100, 120]], [1], embedding=client.encode(photo()))
    assert found.preview is not None and found.preview.size == (400, 300)
    with Image.open(BytesIO(found._repr_png_())) as shown:
        assert shown.getpixel((390, 290)) == (90, 90, 90)
    assert other.preview is None
