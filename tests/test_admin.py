"""Model control and its key: models swapped under load, and everybody else refused."""

from __future__ import annotations

import http.client
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc
from conftest import Exported
from test_predictor import counted, settled

from triton_sam import SAM2TritonClient, cli
from triton_sam.admin import reload
from triton_sam.core import Where
from triton_sam.demo import demo_photo, demo_repository
from triton_sam.errors import (
    AdminError,
    InvalidInputError,
    ModelNotReadyError,
    ServerUnavailableError,
)
from triton_sam.server import EmbeddedServer
from triton_sam.server.control import ADMIN_HEADER, check_key, read_key

KEY = "a-key:with=both_0123456789"
PAIR = ("sam2_encoder", "sam2_decoder")
PREDICTOR = "sam2_predictor"
PROMPT: dict[str, Any] = {"point_coords": [[300, 168]], "point_labels": [1]}
Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(demo_repository(), tmp_path_factory.mktemp("admin") / "models"))


@pytest.fixture(scope="module")
def controlled(repository: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(repository, model_control="explicit", admin_key=KEY) as running:
        yield running


def swap(model: str, source: Path, repository: Path) -> None:
    """Put the file of ``source`` in the place of the one that is served, as the exporter does."""
    target = repository / model / "1" / "model.onnx"
    temporary = target.with_name(".new")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def status(server: EmbeddedServer, method: str, path: str, key: str | None = None) -> int:
    connection = http.client.HTTPConnection(server.http_url, timeout=30)
    connection.request(method, f"/v2/{path}", headers={} if key is None else {ADMIN_HEADER: key})
    code = connection.getresponse().status
    connection.close()
    return code


class Clicks(threading.Thread):
    """One click after the other on an image that was encoded once, and all the answers."""

    def __init__(self, url: str, embedding: Where = "client") -> None:
        super().__init__()
        self._url = url
        self._embedding: Where = embedding
        self.answers: list[Logits] = []
        self.error: Exception | None = None
        self.encoded = threading.Event()
        self.stop = threading.Event()

    def run(self) -> None:
        try:
            with SAM2TritonClient(self._url, embedding=self._embedding) as client:
                client.set_image(demo_photo())
                while not self.stop.is_set():
                    self.answers.append(client.predict(**PROMPT)[0])
                    self.encoded.set()
        except Exception as error:
            self.error = error
            self.encoded.set()


def test_a_pair_is_swapped_under_load_without_a_failed_request(
    controlled: EmbeddedServer, repository: Path, exported: Exported, server: EmbeddedServer
) -> None:
    with (
        SAM2TritonClient(server.url) as reference,
        SAM2TritonClient(controlled.url, embedding="client") as client,
    ):
        reference.set_image(demo_photo())
        wanted, _ = reference.predict(**PROMPT)
        client.set_image(demo_photo())
        before, _ = client.predict(**PROMPT)
        clicks = [Clicks(controlled.url), Clicks(f"http://{controlled.http_url}")]
        for thread in clicks:
            thread.start()
        for thread in clicks:
            assert thread.encoded.wait(60)
        for model in PAIR:
            swap(model, exported.repository / model / "1" / "model.onnx", repository)
        done = list(reload(PAIR, controlled.http_url, KEY))
        mixed, _ = client.predict(**PROMPT)  # the old encoder's embedding, the new decoder
        counts = [len(thread.answers) for thread in clicks]
        for thread, count in zip(clicks, counts, strict=True):
            while thread.error is None and len(thread.answers) < count + 3:
                thread.join(0.02)
            thread.stop.set()
            thread.join(60)
        client.set_image(demo_photo())
        after, _ = client.predict(**PROMPT)
    assert [(result.model, result.versions) for result in done] == [(name, ("1",)) for name in PAIR]
    assert np.abs(before - wanted).max() > 1
    np.testing.assert_allclose(after, wanted, atol=1e-3)
    for thread in clicks:
        assert thread.error is None
        olds = [np.allclose(answer, before, atol=1e-3) for answer in thread.answers]
        news = [np.allclose(answer, mixed, atol=1e-3) for answer in thread.answers]
        assert olds == [not new for new in news]
        assert olds[0] and news[-1]
        assert olds == sorted(olds, reverse=True)  # never back to the old one


def test_a_predictor_is_swapped_under_load_without_a_failed_request(
    controlled: EmbeddedServer, repository: Path, exported: Exported, tmp_path: Path
) -> None:
    """Handles of the old one are unknown to the new one; clients send their image again."""
    with SAM2TritonClient(controlled.url, embedding="server") as client:
        client.set_image(demo_photo())
        before, _ = client.predict(**PROMPT)
        clicks = [
            Clicks(controlled.url, "server"),
            Clicks(f"http://{controlled.http_url}", "server"),
        ]
        for thread in clicks:
            thread.start()
        for thread in clicks:
            assert thread.encoded.wait(60)
        kept = {model: repository / model / "1" / "model.onnx" for model in PAIR}
        for model, file in kept.items():
            shutil.copyfile(file, tmp_path / model)
            swap(model, exported.repository / model / "1" / "model.onnx", repository)
        # As the exporter does: Triton looks for changes in the model's own folder alone.
        (repository / PREDICTOR / "1" / "pair.json").write_text("{}")
        (done,) = reload([PREDICTOR], controlled.http_url, KEY)
        decodes = counted(controlled, "decodes_total")
        counts = [len(thread.answers) for thread in clicks]
        for thread, count in zip(clicks, counts, strict=True):
            while thread.error is None and len(thread.answers) < count + 3:
                thread.join(0.02)
            thread.stop.set()
            thread.join(60)
        # The new one counts on where the old one ended, and answers once it has.
        assert settled(controlled, "decodes_total", decodes + 1) > decodes > 0
        after, _ = client.predict(**PROMPT)
        for model in PAIR:
            swap(model, tmp_path / model, repository)
    assert (done.model, done.versions) == (PREDICTOR, ("1",))
    assert np.abs(before - after).max() > 1
    for thread in clicks:
        assert thread.error is None
        olds = [np.allclose(answer, before, atol=1e-3) for answer in thread.answers]
        news = [np.allclose(answer, after, atol=1e-3) for answer in thread.answers]
        assert olds == [not new for new in news]
        assert olds[0] and news[-1]


def test_a_broken_model_leaves_the_old_one_serving(
    controlled: EmbeddedServer, repository: Path, tmp_path: Path
) -> None:
    file = repository / "sam2_decoder" / "1" / "model.onnx"
    good = shutil.copyfile(file, tmp_path / "good.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with SAM2TritonClient(controlled.url, embedding="client") as client:
        client.set_image(demo_photo())
        before, _ = client.predict(**PROMPT)
        swap("sam2_decoder", tmp_path / "broken.onnx", repository)
        with pytest.raises(
            AdminError, match=r"'sam2_decoder'.*INVALID_PROTOBUF.*goes on answering"
        ):
            list(reload(["sam2_decoder"], controlled.http_url, KEY))
        np.testing.assert_array_equal(client.predict(**PROMPT)[0], before)
        assert status(controlled, "GET", "health/ready") == 200
        swap("sam2_decoder", good, repository)
        assert [done.versions for done in reload(["sam2_decoder"], controlled.http_url, KEY)] == [
            ("1",)
        ]
        np.testing.assert_array_equal(client.predict(**PROMPT)[0], before)


def test_a_model_that_was_put_there_later_can_be_loaded(
    controlled: EmbeddedServer, repository: Path
) -> None:
    assert status(controlled, "GET", "models/later/ready") != 200
    shutil.copytree(repository / "sam2_encoder", repository / "later")
    config = repository / "later" / "config.pbtxt"
    config.write_text(config.read_text().replace("sam2_encoder", "later"))
    assert [done.model for done in reload(["later"], controlled.http_url, KEY)] == ["later"]
    assert status(controlled, "GET", "models/later/ready") == 200


def test_a_model_that_is_not_there(controlled: EmbeddedServer) -> None:
    with pytest.raises(ModelNotReadyError, match="no model 'sam9_encoder' in its repository"):
        list(reload(["sam9_encoder"], controlled.http_url, KEY))


@pytest.mark.parametrize(
    ("key", "message"), [(None, "set TRITON_SAM_ADMIN_KEY"), ("x" * 16, "has another admin key")]
)
def test_without_the_key_nothing_is_loaded(
    controlled: EmbeddedServer, key: str | None, message: str
) -> None:
    with pytest.raises(AdminError, match=message):
        list(reload(PAIR, controlled.http_url, key))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "repository/index"),
        ("POST", "repository/models/sam2_decoder/load"),
        ("POST", "repository/models/sam2_decoder/unload"),
        ("GET", "models/sam2_decoder/config"),
        ("GET", "systemsharedmemory/status"),
        ("GET", "cudasharedmemory/status"),
        ("GET", "trace/setting"),
        ("GET", "logging"),
    ],
)
def test_administrative_endpoints_take_the_key(
    controlled: EmbeddedServer, method: str, path: str
) -> None:
    assert status(controlled, method, path) == 403
    assert status(controlled, method, path, KEY[:-1]) == 403
    if not path.endswith("load"):
        assert status(controlled, method, path, KEY) != 403


@pytest.mark.parametrize(
    "path",
    [
        "health/live",
        "health/ready",
        "models/sam2_decoder/ready",
        "models/sam2_decoder",
        "models/stats",
        "models/sam2_decoder/stats",
    ],
)
def test_what_clients_and_benchmarks_need_is_open(controlled: EmbeddedServer, path: str) -> None:
    assert status(controlled, "GET", path) == 200


def test_grpc_takes_the_key_too(controlled: EmbeddedServer) -> None:
    with tritonclient.grpc.InferenceServerClient(controlled.grpc_url) as client:
        with pytest.raises(tritonclient.grpc.InferenceServerException, match="restricted"):
            client.load_model("sam2_decoder")
        client.load_model("sam2_decoder", headers={f"triton-grpc-protocol-{ADMIN_HEADER}": KEY})
        assert client.get_inference_statistics("sam2_decoder").model_stats[0].name == "sam2_decoder"


def test_a_server_without_model_control_says_so(server: EmbeddedServer) -> None:
    with pytest.raises(AdminError, match=r"mode none\).*serve --model-control explicit"):
        list(reload(PAIR, server.http_url, KEY))


def test_addresses_that_cannot_be_used() -> None:
    with pytest.raises(InvalidInputError, match="over HTTP"):
        reload(PAIR, "grpc://localhost:8001", KEY)
    with pytest.raises(ServerUnavailableError, match=r"127\.0\.0\.1:9"):
        list(reload(PAIR, "http://127.0.0.1:9", KEY))


def test_the_command(
    controlled: EmbeddedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRITON_URL", f"http://{controlled.http_url}")
    monkeypatch.delenv("TRITON_SAM_ADMIN_KEY", raising=False)
    monkeypatch.delenv("TRITON_SAM_ADMIN_KEY_FILE", raising=False)
    assert cli.main(["reload", "sam2"]) == 1
    assert "asks for its admin key" in capsys.readouterr().err
    (tmp_path / "key").write_text(KEY + "\n")
    assert cli.main(["reload", "sam2", "--key-file", str(tmp_path / "key")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        [name, "version 1"] for name in (*PAIR, PREDICTOR)
    ]
    monkeypatch.setenv("TRITON_SAM_ADMIN_KEY", KEY)
    assert cli.main(["reload", "sam2", "--variant", "large"]) == 1
    assert "no model 'sam2_large_encoder' in its repository" in capsys.readouterr().err


class TestKey:
    def test_explicit_control_needs_one(self, repository: Path) -> None:
        with pytest.raises(AdminError, match="openssl rand -hex 32"):
            EmbeddedServer(repository, model_control="explicit")
        with pytest.raises(AdminError, match="'poll', expected none or explicit"):
            EmbeddedServer(repository, model_control="poll")

    @pytest.mark.parametrize(
        ("key", "message"),
        [("short", "5 characters"), ("with space 0123456789", "spaces"), ("é" * 20, "header")],
    )
    def test_one_that_cannot_be_used_is_not_repeated(self, key: str, message: str) -> None:
        with pytest.raises(AdminError, match=message) as caught:
            check_key(key)
        assert key not in str(caught.value)

    def test_where_it_comes_from(self, tmp_path: Path) -> None:
        file, other = tmp_path / "key", tmp_path / "other"
        file.write_text("f" * 16 + "\n")
        other.write_text("o" * 16)
        variables = {
            "TRITON_SAM_ADMIN_KEY": "v" * 16,
            "TRITON_SAM_ADMIN_KEY_FILE": str(file),
        }
        assert read_key(other, variables) == "o" * 16
        assert read_key(None, variables) == "v" * 16
        assert read_key(None, {**variables, "TRITON_SAM_ADMIN_KEY": ""}) == "f" * 16
        assert read_key(None, {"TRITON_SAM_ADMIN_KEY_FILE": os.devnull}) is None
        assert read_key(None, {}) is None
        with pytest.raises(AdminError, match="No such file"):
            read_key(tmp_path / "none", {})
