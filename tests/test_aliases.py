"""Alias models, asked as the clients in the field ask: raw calls, values held against the pair."""

from __future__ import annotations

import json
import queue
import shutil
import uuid
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from conftest import Exported
from numpy.typing import NDArray
from PIL import Image

from triton_sam import cli
from triton_sam.aliases import check_aliases, write_aliases
from triton_sam.client import SAM2TritonClient
from triton_sam.demo import demo_photo, demo_repository
from triton_sam.export.parity import OnnxRuntimeTransport
from triton_sam.images import preprocess
from triton_sam.protocol import Call
from triton_sam.server import EmbeddedServer
from triton_sam.specs import FAMILIES

SAM2 = FAMILIES["sam2"]
FEATURES = ["image_embed", "high_res_feats_0", "high_res_feats_1"]
INBOUND = [("grpc.max_receive_message_length", 32 * 1024 * 1024)]

Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("aliases")
    for model in SAM2.models:
        (root / model.name).symlink_to(demo_repository() / model.name)
    assert cli.main(["configure", "--aliases", "--repository", str(root)]) == 0
    return root


@pytest.fixture(scope="module")
def served(repository: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(repository) as server:
        yield server


def stream_infer(url: str, model: str, tensor: triton_grpc.InferInput, outputs: list[str]) -> Any:
    """As the annotation tool's library: ModelReady, then ModelStreamInfer with gzip."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    request = str(uuid.uuid4())
    with triton_grpc.InferenceServerClient(url, channel_args=INBOUND) as client:
        assert client.is_model_ready(model)
        client.start_stream(
            lambda result, error: answers.put((result, error)), compression_algorithm="gzip"
        )
        wanted = [triton_grpc.InferRequestedOutput(name) for name in outputs]
        client.async_stream_infer(model, [tensor], outputs=wanted, request_id=request, priority=5)
        result, error = answers.get(timeout=60)
        client.stop_stream()
    if error is None:
        assert result.get_response().id == request
    return result, error


def float_input(name: str, array: NDArray[np.float32]) -> triton_grpc.InferInput:
    return triton_grpc.InferInput(name, list(array.shape), "FP32").set_data_from_numpy(array)


def bytes_input(data: bytes) -> triton_grpc.InferInput:
    tensor = triton_grpc.InferInput("encoded_image", [1], "BYTES")
    return tensor.set_data_from_numpy(np.array([data], np.object_))


def address(server: EmbeddedServer) -> str:
    return server.grpc_url.removeprefix("grpc://")


def of_the_pair(server: EmbeddedServer, image: Image.Image) -> Arrays:
    with SAM2TritonClient(server.url, embedding="client") as client:
        tensors = client.encode(image).tensors
    return {"image_embed": tensors["image_embeddings"], **{k: tensors[k] for k in FEATURES[1:]}}


def test_the_link_library_gets_the_embedding_under_its_names(served: EmbeddedServer) -> None:
    photo = demo_photo()
    tensor = float_input("image", preprocess(photo, SAM2.image))
    result, error = stream_infer(address(served), "sam2.1_large_encoder", tensor, FEATURES)
    assert error is None
    for name, expected in of_the_pair(served, photo).items():
        np.testing.assert_array_equal(result.as_numpy(name), expected)
        assert result.as_numpy(name).dtype == np.float32


@pytest.mark.parametrize(
    ("family", "model"), [("sam1", "sam1_encoder"), ("sam3", "sam3_tracker_encoder_fp16")]
)
def test_the_link_library_and_the_other_families(
    family: str, model: str, small: Callable[[str], Exported], tmp_path: Path
) -> None:
    result = small(family)
    encoder = result.family.encoder
    (tmp_path / encoder.name).symlink_to(result.repository / encoder.name)
    write_aliases(tmp_path)
    pixels = preprocess(demo_photo(), result.family.image)
    names = [tensor.name for tensor in encoder.outputs]
    with EmbeddedServer(tmp_path) as server:
        tensor = float_input(encoder.inputs[0].name, pixels)
        answer, error = stream_infer(address(server), model, tensor, names)
    assert error is None
    transport = OnnxRuntimeTransport({encoder.name: result.file(encoder.name)})
    expected = transport.infer(Call(encoder.name, {encoder.inputs[0].name: pixels}, tuple(names)))
    for name in names:
        assert answer.as_numpy(name).dtype == np.float32
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(answer.as_numpy(name), expected[name], atol=1e-5 * scale)


def test_a_jpeg_is_enough(served: EmbeddedServer) -> None:
    data = BytesIO()
    demo_photo().save(data, "JPEG", quality=90)
    result, error = stream_infer(
        address(served), "sam2_encoder_jpeg", bytes_input(data.getvalue()), FEATURES
    )
    assert error is None
    expected = of_the_pair(served, Image.open(data))
    for name in FEATURES:
        # The server's own Pillow decodes and resizes; the pixels are the same.
        np.testing.assert_array_equal(result.as_numpy(name), expected[name])


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe0 half a file"])
def test_what_is_no_jpeg_is_one_clear_error(served: EmbeddedServer, data: bytes) -> None:
    _, error = stream_infer(address(served), "sam2_encoder_jpeg", bytes_input(data), FEATURES)
    assert "image" in str(error) and "Traceback" not in str(error)
    test_a_jpeg_is_enough(served)


def test_stale_aliases_are_seen(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in SAM2.models:
        (tmp_path / model.name).symlink_to(repository / model.name)
    assert [path.name for path in write_aliases(tmp_path)] == [
        "sam2.1_large_encoder",
        "sam2_encoder_jpeg",
    ]
    assert list(check_aliases(tmp_path)) == []
    (tmp_path / "sam2_preprocess/1/triton_sam_part/images.py").write_text("")
    (tmp_path / "sam2.1_large_encoder/config.pbtxt").unlink()
    assert [str(problem).partition("; run ")[0] for problem in check_aliases(tmp_path)] == [
        "sam2.1_large_encoder: config.pbtxt is stale",
        "sam2_preprocess: 1/triton_sam_part/images.py is stale",
    ]
    capsys.readouterr()
    assert cli.main(["check", "--repository", str(tmp_path)]) == 1
    (tmp_path / "sam2_encoder").unlink()
    assert "sam2_encoder_jpeg: the encoder of sam2" in str(list(check_aliases(tmp_path))[-1])


def test_the_variant_goes_before_the_default(tmp_path: Path) -> None:
    large = SAM2.named("large").encoder
    for name in (SAM2.encoder.name, large.name):
        (tmp_path / name).symlink_to(demo_repository() / SAM2.encoder.name)
    write_aliases(tmp_path)
    text = (tmp_path / "sam2.1_large_encoder/config.pbtxt").read_text()
    assert f'model_name: "{large.name}"' in text
    text = (tmp_path / "sam2_encoder_jpeg/config.pbtxt").read_text()
    assert f'model_name: "{SAM2.encoder.name}"' in text


def test_another_variant_in_its_place_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Path(shutil.copytree(demo_repository() / "sam2_encoder", tmp_path / "sam2_encoder"))
    write_aliases(tmp_path)
    assert caplog.messages == [
        "sam2.1_large_encoder is served by sam2_encoder, which is the variant demo and not large."
    ]
    caplog.clear()
    # As `export sam2 --variant large --default` leaves it.
    manifest = encoder / "1/export.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"variant": "large"}))
    write_aliases(tmp_path)
    assert caplog.messages == []


def test_without_an_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["configure", "--aliases", "--repository", str(tmp_path)]) == 1
    assert "No encoder in" in capsys.readouterr().err
