"""Encoded images that predictors share through Redis: a real server, also gone, damaged or mute."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from fakes import photo
from plain_pair import install_plain_pair, logits_of
from predictors import FakeEngine, PredictorTransport, ask
from soak_store import read_metrics
from test_cache_redis import RedisServer, free_port
from test_predictor_service import CLICK, LOOK, SPEC, png, point, text

from triton_sam import SAM2TritonClient
from triton_sam.cache import RedisTier, Tier, TierStats
from triton_sam.embedding import Embedding, EmbeddingKey
from triton_sam.errors import InvalidInputError
from triton_sam.predictor.engine import Device, Engine
from triton_sam.predictor.service import Predictor
from triton_sam.predictor.settings import Settings
from triton_sam.predictor.store import Encoded, image_handle
from triton_sam.server import EmbeddedServer
from triton_sam.sharing import SharedStore, pair_version

Made = tuple[Predictor, FakeEngine]


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def server(redis_server: RedisServer) -> RedisServer:
    redis_server.ask("FLUSHALL")
    return redis_server


@pytest.fixture
def make() -> Iterator[Callable[..., Made]]:
    """Makes predictors that share images through the Redis at a URL, or another tier."""
    with ExitStack() as stack:

        def made(tier: str | Tier, version: str = "v1", limit_s: float = 20) -> Made:
            engine = FakeEngine(SPEC)
            if isinstance(tier, str):
                tier = RedisTier(tier, timeout_s=limit_s / 2)
            shared = SharedStore(tier, SPEC, version, engine.hold, limit_s=limit_s)
            predictor = Predictor(engine, Settings(), shared)
            stack.callback(predictor.close)
            return predictor, engine

        yield made


def only_key(server: RedisServer) -> bytes:
    keys = server.ask("KEYS", "*")
    assert isinstance(keys, list) and len(keys) == 1
    return bytes(keys[0])


def counted(predictor: Predictor, name: str, at_least: int) -> int:
    """The count once it has come that far: images are written after the answer."""
    end = time.monotonic() + 10
    while (count := predictor.counts()[name]) < at_least and time.monotonic() < end:
        time.sleep(0.005)
    return count


def test_another_predictor_fetches_what_one_has_encoded(
    make: Callable[..., Made], server: RedisServer
) -> None:
    (first, _), (second, engine) = make(server.url), make(server.url)
    with (
        SAM2TritonClient(transport=PredictorTransport(first)) as one,
        SAM2TritonClient(transport=PredictorTransport(second)) as other,
    ):
        one.set_image(png(photo()))
        assert counted(first, "redis_stored", 1) == 1
        other.set_image(png(photo()))
        assert other.original_size == (300, 400)
        for got, expected in zip(
            other.predict([[100, 50]], [1]), one.predict([[100, 50]], [1]), strict=True
        ):
            np.testing.assert_array_equal(got, expected)
    assert engine.encoded == 0
    found = {name: second.counts()[name] for name in ("redis_hits", "redis_misses", "encodes")}
    assert found == {"redis_hits": 1, "redis_misses": 0, "encodes": 0}
    # Counted as one that was there, like any other of the requests: the look, and the click.
    assert (second.counts()["store_hits"], second.counts()["store_misses"]) == (2, 0)
    assert second.counts()["store_bytes"] == 16_777_216


def test_an_image_that_is_sent_is_looked_for_before_it_is_encoded(
    make: Callable[..., Made], server: RedisServer
) -> None:
    (first, _), (second, engine) = make(server.url), make(server.url)
    for predictor in (first, second):
        asked = ask(predictor, (*LOOK, "iou_predictions"), image=photo(), **point(5, 5))
        assert asked.result(10)["iou_predictions"].shape == (1, 1)
        assert counted(first, "redis_stored", 1) == 1
    assert engine.encoded == 0


def test_many_who_ask_for_an_image_at_once_have_it_fetched_once(
    make: Callable[..., Made], server: RedisServer
) -> None:
    (first, _), (second, _) = make(server.url), make(server.url)
    handle = ask(first, LOOK, image=photo()).result(10)["handle"]
    assert counted(first, "redis_stored", 1) == 1
    clicks = [ask(second, CLICK, image_handle=handle, **point(5, 5)) for _ in range(20)]
    assert all(click.result(10)["found"][0] for click in clicks)
    assert second.counts()["redis_hits"] == 1


@pytest.mark.parametrize("other", ["version", "family"])
def test_another_pair_does_not_find_it(
    other: str, make: Callable[..., Made], server: RedisServer
) -> None:
    first, _ = make(server.url)
    handle = ask(first, LOOK, image=photo()).result(10)["handle"]
    assert counted(first, "redis_stored", 1) == 1
    if other == "version":
        second, _ = make(server.url, version="v2")
        assert not ask(second, LOOK, image_handle=handle).result(10)["found"][0]
    else:
        tier = RedisTier(server.url)
        shared = SharedStore(tier, SPEC.named("large"), "v1", lambda array: array)
        assert shared.get(bytes(handle[0]).decode()) is None
        shared.close()


def test_the_version_of_a_pair_is_that_of_its_files(tmp_path: Path) -> None:
    install_plain_pair(tmp_path)
    before = pair_version(tmp_path, SPEC)
    assert pair_version(tmp_path, SPEC) == before and len(before) == 32
    data = tmp_path / SPEC.encoder.name / "1" / SPEC.encoder.data_file
    data.write_bytes(b"weights")
    with_data = pair_version(tmp_path, SPEC)
    data.write_bytes(b"Weights")
    assert len({before, with_data, pair_version(tmp_path, SPEC)}) == 3


def test_a_tenants_image_is_found_with_the_key_alone(
    make: Callable[..., Made], server: RedisServer
) -> None:
    (first, _), (second, engine) = make(server.url), make(server.url)
    ask(first, LOOK, image=photo(), tenant_key=text(b"mine")).result(10)
    assert counted(first, "redis_stored", 1) == 1
    plain, own = (image_handle(photo(), key) for key in (b"", b"mine"))
    assert not ask(second, LOOK, image_handle=text(plain.encode())).result(10)["found"][0]
    assert ask(second, LOOK, image_handle=text(own.encode())).result(10)["found"][0]
    name = only_key(server)
    assert own.encode() not in name and name.startswith(b"triton-sam:")
    assert engine.encoded == 0


@pytest.mark.parametrize("damage", ["truncated", "changed", "foreign"])
def test_a_damaged_entry_is_a_miss(
    damage: str, make: Callable[..., Made], server: RedisServer
) -> None:
    (first, _), (second, engine) = make(server.url), make(server.url)
    with SAM2TritonClient(transport=PredictorTransport(first)) as client:
        client.set_image(photo())
        expected = client.predict([[5, 5]], [1])
    assert counted(first, "redis_stored", 1) == 1
    name = only_key(server)
    content = server.ask("GET", name)
    assert isinstance(content, bytes)
    middle = len(content) // 2
    other = {
        "truncated": content[:middle],
        "changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "foreign": b"something else",
    }
    server.ask("SET", name, other[damage])
    with SAM2TritonClient(transport=PredictorTransport(second)) as client:
        client.set_image(photo())
        for got, wanted in zip(client.predict([[5, 5]], [1]), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)
    counts = second.counts()
    assert engine.encoded == 1 and counts["redis_hits"] == counts["redis_failures"] == 0
    assert counts["redis_misses"] == 2  # by its handle, and again when it was sent


def test_without_its_server_images_are_encoded(
    make: Callable[..., Made], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = RedisServer(tmp_path)
    first, engine = make(server.url)
    ask(first, LOOK, image=photo(seed=1)).result(10)
    assert counted(first, "redis_stored", 1) == 1
    server.kill()
    for seed in range(2, 8):
        asked = ask(first, CLICK, image=photo(seed=seed), **point(5, 5))
        assert asked.result(10)["found"][0]
    assert engine.encoded == 7
    assert 1 <= first.counts()["redis_failures"] <= 2
    assert "cannot read the redis cache" in caplog.text


def test_a_server_that_says_nothing_is_not_waited_for(make: Callable[..., Made]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as mute:
        url = f"redis://127.0.0.1:{mute.getsockname()[1]}/0"
        predictor, engine = make(url, limit_s=1)
        started = time.monotonic()
        unknown = [ask(predictor, LOOK, image_handle=text(b"x%d" % i)) for i in range(50)]
        assert not any(asked.result(10)["found"][0] for asked in unknown)
        # A look-up takes a second at most, however many wait.
        assert 0.4 < time.monotonic() - started < 8
        time.sleep(1)
        started = time.monotonic()
        assert ask(predictor, CLICK, image=photo(), **point(5, 5)).result(10)["found"][0]
        assert time.monotonic() - started < 2.5
    assert engine.encoded == 1 and predictor.counts()["redis_failures"] >= 4


class SlowTier(Tier):
    """Writes nothing until it may."""

    name = "slow"

    def __init__(self) -> None:
        self.may_write = threading.Event()
        self.written: list[Embedding] = []

    def get(self, key: EmbeddingKey) -> Embedding | None:
        return None

    def put(self, embedding: Embedding) -> bool:
        assert self.may_write.wait(10)
        self.written.append(embedding)
        return True

    def clear(self) -> None:
        self.written.clear()

    def stats(self) -> TierStats:
        return TierStats(self.name)


def test_an_image_is_written_after_the_answer_and_few_wait_for_that(
    make: Callable[..., Made],
) -> None:
    tier = SlowTier()
    predictor, _ = make(tier)
    for seed in range(8):
        assert ask(predictor, LOOK, image=photo(seed=seed)).result(10)["found"][0]
    assert tier.written == []
    tier.may_write.set()
    assert counted(predictor, "redis_stored", 4) == 4
    handles = [image_handle(photo(seed=seed)) for seed in range(4)]
    assert [embedding.digest for embedding in tier.written] == handles


class OnDevice:
    """As ONNX Runtime's own values."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def numpy(self) -> np.ndarray:
        return self._array


def test_tensors_come_back_as_they_were(server: RedisServer) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {
        "half": rng.standard_normal((1, 3, 5)).astype(np.float16),
        "single": rng.standard_normal((2, 7)).astype(np.float32),
        "whole": np.arange(5, dtype=np.int64),
    }
    tier = RedisTier(server.url, timeout_s=20)
    shared = SharedStore(tier, SPEC, "v1", OnDevice, limit_s=20)
    nbytes = sum(array.nbytes for array in tensors.values())
    shared.put("a", Encoded({name: OnDevice(a) for name, a in tensors.items()}, (4, 6), nbytes))
    while not shared.counts()["redis_stored"]:
        time.sleep(0.005)
    found = shared.get("a")
    assert found is not None and (found.original_size, found.nbytes) == ((4, 6), nbytes)
    for name, array in tensors.items():
        got = found.tensors[name].numpy()
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)
    shared.close()


def test_a_real_engine_goes_on_with_what_another_encoded(
    server: RedisServer, tmp_path: Path
) -> None:
    install_plain_pair(tmp_path)
    image, answers = photo(), []
    for _ in range(2):
        engine = Engine(SPEC, tmp_path, Device(), threads=1)
        tier = RedisTier(server.url, timeout_s=20)
        version = pair_version(tmp_path, SPEC)
        shared = SharedStore(tier, SPEC, version, engine.hold, engine.make_way, limit_s=20)
        predictor = Predictor(engine, Settings(), shared)
        with (
            closing(predictor),
            SAM2TritonClient(transport=PredictorTransport(predictor)) as client,
        ):
            client.set_image(image)
            answers.append(client.predict([[100, 75]], [1], multimask_output=True))
            # The first one writes while it goes on.
            encodes = predictor.counts()["encodes"]
            assert counted(predictor, "redis_stored", encodes) == encodes
    assert encodes == 0
    for got, expected in zip(*answers, strict=True):
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(answers[1][1], [[0.25, 0.25, 1]], atol=1e-6)


def test_two_servers_share_what_one_of_them_encodes(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_SAM_STORE_REDIS", server.url)
    install_plain_pair(tmp_path)
    image = np.full((30, 40, 3), (40, 80, 120), np.uint8)
    with ExitStack() as stack:
        for turn in range(2):
            triton = stack.enter_context(EmbeddedServer(tmp_path))
            with SAM2TritonClient(triton.url, embedding="server") as client:
                client.set_image(image)
                logits, _ = client.predict([[10, 10]], [1], multimask_output=True)
            np.testing.assert_allclose(
                logits[0].transpose(1, 2, 0),
                np.broadcast_to(logits_of(image[0, 0]), (256, 256, 3)),
                atol=1e-3,
            )
            # Written after the answer, and the page is up to a second behind.
            end = time.monotonic() + 20
            while time.monotonic() < end:
                counts = read_metrics(triton.metrics_url)
                if counts["redis_stored_total"] + counts["redis_hits_total"]:
                    break
                time.sleep(0.2)
            assert (counts["encodes_total"], counts["redis_hits_total"]) == (1 - turn, turn)
            assert counts["redis_stored_total"] == 1 - turn


def test_a_url_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    install_plain_pair(tmp_path)
    engine = FakeEngine(SPEC)
    with pytest.raises(InvalidInputError, match="Cannot use the Redis URL"):
        SharedStore.open("nonsense", 60, SPEC, tmp_path, engine.hold, engine.make_way)
    assert Settings.read({"TRITON_SAM_STORE_REDIS": "redis://a"}, False).redis_url == "redis://a"
    assert Settings.read({}, False).redis_url == ""


def test_nobody_listens(make: Callable[..., Made]) -> None:
    predictor, engine = make(f"redis://127.0.0.1:{free_port()}/0")
    started = time.monotonic()
    for seed in range(3):
        assert ask(predictor, LOOK, image=photo(seed=seed)).result(10)["found"][0]
    assert engine.encoded == 3 and time.monotonic() - started < 5
