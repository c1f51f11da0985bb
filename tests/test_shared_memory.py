"""Embeddings in memory that client and server share: right, small on the wire, cleaned up."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SPEC
from faces import FACES, open_client
from fakes import FakeTransport, answer, photo

from triton_sam import (
    InferenceError,
    InvalidInputError,
    SAM2TritonClient,
    SamError,
    SharedMemoryError,
    shared_memory,
)
from triton_sam.benchmark.wire import CountingProxy
from triton_sam.cache import EmbeddingCache, MemoryTier
from triton_sam.demo import demo_repository
from triton_sam.embedding import Embedding
from triton_sam.server import EmbeddedServer
from triton_sam.shared_embedding import SharedEmbedding
from triton_sam.shared_memory import PREFIX, Place, Region, is_left, remove_dead
from triton_sam.transport import Endpoint, open_transport
from triton_sam.transport.requests import ListRegions, Memory, Unregister

PROMPTS: list[dict[str, Any]] = [
    {"point_coords": [[30, 40]], "point_labels": [1]},
    {"box": [10, 20, 200, 250], "multimask_output": True},
    {"point_coords": [[[30, 40]], [[200, 100]]], "point_labels": [[1], [1]]},
    {"point_coords": [[9, 9]], "point_labels": [0], "mask_input": np.ones((256, 256))},
]


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(demo_repository()) as running:
        yield running


def region_of(embedding: Embedding) -> Region:
    assert isinstance(embedding, SharedEmbedding)
    return embedding.region


def known_to(server: EmbeddedServer) -> set[str]:
    with closing(open_transport(server.url)) as way:
        found: frozenset[str] = way.memory(ListRegions())  # type: ignore[attr-defined]
    return {name for name in found if name.startswith(PREFIX)}


def left_here() -> set[str]:
    return {path.name for path in shared_memory.SHARED_MEMORY.glob(f"{PREFIX}{os.getpid()}-*")}


def url_of(server: EmbeddedServer, protocol: str) -> str:
    return server.url if protocol == "grpc" else f"http://{server.http_url}"


def shared(url: str, **arguments: Any) -> SAM2TritonClient:
    return SAM2TritonClient(url, embedding="shared-memory", **arguments)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert left_here() == set()


def test_a_region_holds_tensors_and_goes_with_its_name() -> None:
    region = Region(64)
    path = Path("/dev/shm", region.name)
    assert is_left(region.name) and path.stat().st_mode & 0o777 == 0o600
    with path.open("r+b") as file:
        file.seek(16)
        file.write(np.arange(4, dtype=np.float32).tobytes())
    array = region.array(Place(region.name, 16, "float32", (2, 2)))
    region.remove()
    assert not is_left(region.name)
    np.testing.assert_array_equal(array, [[0, 1], [2, 3]])
    assert not array.flags.writeable


def test_only_what_nobody_owns_is_removed() -> None:
    living, dead = Region(8), Region(8)
    names = [living.name, dead.name]
    del dead  # as a crash does: the file stays, the lock goes
    gc.collect()
    remove_dead()
    assert [is_left(name) for name in names] == [True, False]
    living.remove()


def test_memory_that_cannot_be_had_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SharedMemoryError, match="no room for 1125899906842624 bytes in /dev/shm"):
        Region(1 << 50)
    assert left_here() == set()
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path / "none")
    with pytest.raises(SharedMemoryError, match="This system has no"):
        Region(8)
    monkeypatch.undo()


def test_what_it_does_not_go_with_is_refused() -> None:
    way = FakeTransport(SPEC, lambda call: answer(SPEC, call))
    with pytest.raises(InvalidInputError, match="embedding='shared-memory' leaves them"):
        shared("localhost:1", cache=EmbeddingCache(MemoryTier(max_bytes=1)))
    with (
        SAM2TritonClient(transport=way, embedding="shared-memory") as client,
        pytest.raises(SharedMemoryError, match="FakeTransport has none"),
    ):
        client.set_image(photo())


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_masks_are_those_of_the_embedding_in_the_client(
    server: EmbeddedServer, protocol: str, face: str
) -> None:
    url = url_of(server, protocol)
    with (
        open_client(face, url, embedding="shared-memory") as client,
        open_client(face, url, embedding="client") as inline,
    ):
        client.set_image(photo())
        inline.set_image(photo())
        for prompt in PROMPTS:
            own, other = client.segment(**prompt), inline.segment(**prompt)
            np.testing.assert_array_equal(own.logits, other.logits)
            np.testing.assert_array_equal(own.scores, other.scores)
            np.testing.assert_array_equal(own.masks, other.masks)
        for name, tensor in inline.embedding.tensors.items():
            np.testing.assert_array_equal(client.embedding.tensors[name], tensor)
        # It is an embedding as any other to whoever has it.
        loaded = Embedding.from_bytes(client.embedding.to_bytes())
        expected, _ = client.predict(**PROMPTS[0])
        for embedding in (loaded, client.embedding):
            masks, _ = inline.predict(**PROMPTS[0], embedding=embedding)
            np.testing.assert_array_equal(masks, expected)
        names = {region_of(client.embedding).name}
        assert names <= known_to(server)
    assert not names & known_to(server)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_embedding_does_not_cross_the_wire(server: EmbeddedServer, protocol: str) -> None:
    with (
        CountingProxy(Endpoint.parse(url_of(server, protocol))) as proxy,
        shared(proxy.url) as client,
    ):
        client.set_image(photo())
        encoded = proxy.total
        client.predict([[30, 40]], [1])
        clicked = proxy.total - encoded
    assert 12_582_912 < encoded.up < 12_700_000 and encoded.down < 20_000
    assert clicked.up < 5000 and 262_144 < clicked.down < 280_000


def test_a_region_lives_as_long_as_its_image(server: EmbeddedServer) -> None:
    with shared(server.url) as client:
        kept = client.encode(photo(seed=1))
        client.set_image(photo(seed=2))
        first, second = region_of(kept).name, region_of(client.embedding).name
        assert {first, second} <= known_to(server)
        client.set_image(photo(seed=3))
        assert not is_left(second) and second not in known_to(server)
        expected, _ = client.predict([[30, 40]], [1], embedding=kept)
        del kept
        gc.collect()
        assert not is_left(first)
        client.set_image(photo(seed=4))
        assert first not in known_to(server)
        last = client.embedding
        name = region_of(last).name
    assert not is_left(name) and name not in known_to(server)
    with shared(server.url) as client:
        masks, _ = client.predict([[30, 40]], [1], embedding=last)
        assert masks.shape == expected.shape and not np.array_equal(masks, expected)


def test_memory_that_is_still_in_use_is_taken_back_a_moment_later(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = shared(server.url)
    client.set_image(photo(seed=1))
    first = region_of(client.embedding).name
    # What Triton does until it has let go of a call that it has answered.
    refusals = [InferenceError(f"Cannot unregister {first}, it is currently in use.")] * 3
    manage = client._transport.memory  # type: ignore[attr-defined]

    def refuse(request: Memory, *arguments: Any) -> Any:
        if isinstance(request, Unregister) and refusals:
            raise refusals.pop()
        return manage(request, *arguments)

    monkeypatch.setattr(client._transport, "memory", refuse)
    client.set_image(photo(seed=2))
    second = region_of(client.embedding).name
    assert len(refusals) == 2 and {first, second} <= known_to(server)
    client.close()
    assert not refusals and not {first, second} & known_to(server)


def test_a_server_that_does_not_let_go_holds_up_no_close(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = shared(server.url)
    client.set_image(photo())
    name = region_of(client.embedding).name
    with monkeypatch.context() as patch:

        def refuse(request: Memory, *_: Any) -> Any:
            raise InferenceError(f"Cannot unregister {name}, it is currently in use.")

        patch.setattr(client._transport, "memory", refuse)
        started = time.monotonic()
        client.close()
        assert time.monotonic() - started < 5
    # The next one sees to it.
    with shared(server.url) as another:
        another.set_image(photo())
        assert name not in known_to(server)


CRASH = """
import sys, time
import numpy as np
from triton_sam import SAM2TritonClient
client = SAM2TritonClient(sys.argv[1], embedding="shared-memory")
client.set_image(np.zeros((30, 40, 3), np.uint8))
print(client.embedding.region.name, flush=True)
time.sleep(60)
"""


def test_what_a_killed_client_leaves_the_next_one_removes(server: EmbeddedServer) -> None:
    command = [sys.executable, "-c", CRASH, server.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        name = killed.stdout.readline().strip()
        assert name.startswith(f"{PREFIX}{killed.pid}-") and name in known_to(server)
        with shared(server.url) as client:
            client.set_image(photo())
            assert is_left(name)  # its owner lives
            killed.send_signal(signal.SIGKILL)
            killed.wait()
    assert is_left(name) and name in known_to(server)
    with shared(f"http://{server.http_url}") as client:
        client.set_image(photo())
        assert not is_left(name) and name not in known_to(server)
    assert server.running


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_client_that_is_closed_in_a_call_leaves_nothing(
    server: EmbeddedServer, protocol: str
) -> None:
    url = url_of(server, protocol)
    failed: list[BaseException] = []

    def encode(client: SAM2TritonClient) -> None:
        try:
            client.set_image(photo(seed=5))
        except SamError as exc:
            failed.append(exc)

    for seconds in (0.2, 0.4, 0.6):
        client = shared(url)
        thread = threading.Thread(target=encode, args=(client,))
        thread.start()
        time.sleep(seconds)
        client.close()
        thread.join()
        del client
    gc.collect()
    assert left_here() == set()
    with shared(url) as client:
        client.set_image(photo(seed=6))
        client.set_image(photo(seed=7))
        others = known_to(server) - {region_of(client.embedding).name}
    # Triton 2.51 sometimes holds the memory of a call that was cancelled while it ran.
    way: Any = open_transport(server.url)
    for name in others:
        try:
            way.memory(Unregister(name), 10)
        except InferenceError as exc:
            assert "currently in use" in str(exc)
    way.close()
    assert server.running


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_restarted_server_is_told_of_the_region_again(protocol: str) -> None:
    server = EmbeddedServer(demo_repository())
    server.start()
    try:
        http, grpc = (int(url.rsplit(":")[-1]) for url in (server.http_url, server.grpc_url))
        with shared(url_of(server, protocol)) as client:
            client.set_image(photo())
            before, _ = client.predict([[100, 100]], [1])
            server.stop()
            server = EmbeddedServer(demo_repository(), http_port=http, grpc_port=grpc)
            server.start()
            assert known_to(server) == set()
            after, _ = client.predict([[100, 100]], [1])
            assert known_to(server) == {region_of(client.embedding).name}
        np.testing.assert_array_equal(before, after)
    finally:
        server.stop()


def test_where_it_cannot_work_that_is_said(
    server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)  # as in another namespace
    for protocol in ("grpc", "http"):
        with (
            shared(url_of(server, protocol)) as client,
            pytest.raises(SharedMemoryError, match="needs a server on this machine"),
        ):
            client.set_image(photo())
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with EmbeddedServer(demo_repository(), admin_key="0123456789abcdef") as closed:
        for protocol in ("grpc", "http"):
            with (
                shared(url_of(closed, protocol)) as client,
                pytest.raises(SharedMemoryError, match="that allows it"),
            ):
                client.set_image(photo())
