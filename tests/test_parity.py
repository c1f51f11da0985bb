"""The masks of the served models are the official predictor's, for every kind of prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.http as triton_http
from conftest import SMALL, SPEC, Exported, export_apart
from faces import FACES, open_client
from PIL import Image

import triton_sam
from triton_sam import repository
from triton_sam.benchmark.wire import CountingProxy
from triton_sam.demo import demo_repository
from triton_sam.export import sam2
from triton_sam.export.checkpoints import checkpoint_from_pair
from triton_sam.export.parity import Difference, Predictor, Remembering, compare_image
from triton_sam.images import load_image
from triton_sam.server import EmbeddedServer
from triton_sam.specs import Family
from triton_sam.transport import Endpoint

Arrays = dict[str, np.ndarray]


def _images() -> Iterator[tuple[str, Image.Image]]:
    photo = load_image(Path(triton_sam.__file__).parent / "assets/coffee.jpg")
    yield "landscape", photo
    yield "portrait", photo.crop((170, 0, 430, 400)).resize((780, 1200), Image.Resampling.BICUBIC)
    yield "tiny", photo.resize((37, 23))


def _assert_parity(
    url: str,
    family: Family,
    predictor: Predictor,
    degenerate: bool = False,
    face: str = "sync",
    images: int = 3,
    embedding: str = "auto",
    timeout_s: float = 60.0,
) -> list[Difference]:
    differences = []
    options = {"model_type": family.name, "embedding": embedding, "timeout_s": timeout_s}
    with open_client(face, url, **options) as client:
        for name, image in islice(_images(), images):
            for difference in compare_image(client, predictor, image, name):
                assert difference.within_tolerance, difference
                assert degenerate or 0 < difference.foreground < 1, difference
                differences.append(difference)
    assert any(0 < difference.foreground < 1 for difference in differences)
    return differences


@pytest.fixture(scope="module", params=SMALL)
def served(
    request: pytest.FixtureRequest, small: Callable[[str], Exported]
) -> Iterator[tuple[Exported, Remembering, EmbeddedServer]]:
    """A small random model of each family, its official predictor, and a server for it."""
    result = small(request.param)
    with EmbeddedServer(result.repository) as server:
        yield result, Remembering(result.predictor()), server


@pytest.mark.parametrize("embedding", ["server", "client"])
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_small_models_with_random_weights(
    served: tuple[Exported, Remembering, EmbeddedServer], protocol: str, face: str, embedding: str
) -> None:
    result, official, server = served
    url = server.url if protocol == "grpc" else f"http://{server.http_url}"
    # What differs between images is decided before the faces part.
    images = 3 if (protocol, face) == ("grpc", "sync") else 1
    _assert_parity(url, result.family, official, face=face, images=images, embedding=embedding)


def test_shared_memory(served: tuple[Exported, Remembering, EmbeddedServer]) -> None:
    result, official, server = served
    ways = [("sync", server.url)]
    if result.family is SPEC:  # what differs between the ways does not differ between families
        http = f"http://{server.http_url}"
        ways += [("async", server.url), ("sync", http), ("async", http)]
    for face, url in ways:
        options: dict[str, Any] = {"face": face, "embedding": "shared-memory", "images": 1}
        _assert_parity(url, result.family, official, **options)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_mask_that_comes_back_is_named_and_no_other(
    served: tuple[Exported, Remembering, EmbeddedServer], protocol: str, face: str
) -> None:
    """A corrective click with the mask of the click before is less than 1 kB up, and right."""
    result, official, server = served
    family, image = result.family, next(_images())[1]
    url = server.url if protocol == "grpc" else f"http://{server.http_url}"
    first = {"point_coords": np.array([[300, 168]]), "point_labels": np.array([1])}
    second = {"point_coords": np.array([[80, 60]]), "point_labels": np.array([0])}
    official.set_image(image)
    with CountingProxy(Endpoint.parse(url)) as proxy:

        def bytes_up(mask: np.ndarray) -> tuple[int, np.ndarray]:
            before = proxy.total.up
            answer, _ = client.predict(**second, mask_input=mask)
            return proxy.total.up - before, answer

        options = {"model_type": family.name, "embedding": "server"}
        with open_client(face, proxy.url, **options) as client:
            client.set_image(image)
            mask, _ = client.predict(**first)
            named, answer = bytes_up(mask)
        given = np.array(mask[0])  # what came from a server is read-only, which torch warns of
        _, _, logits = official.predict(**second, mask_input=given, multimask_output=False)
        with open_client(face, proxy.url, **options) as client:
            client.set_image(image)
            sent, same = bytes_up(mask)
    assert 0 < named <= 1000 and mask.nbytes < sent
    np.testing.assert_array_equal(answer, same)
    logits = np.reshape(logits, answer.shape)
    np.testing.assert_allclose(answer, logits, atol=1e-3 * np.abs(logits).max())


# The tracker first: its export takes 13 GB, and this process keeps what later cases take.
@pytest.mark.parametrize(
    ("name", "variant", "peak_gb"),
    [
        pytest.param("sam3", "tracker", 16, marks=pytest.mark.slow),
        pytest.param("sam2", "base_plus", 8, marks=pytest.mark.slow),
        pytest.param("sam1", "vit_b", 12, marks=pytest.mark.slow),
        ("sam2", "tiny", 8),
    ],
)
def test_full_size_with_random_weights(
    name: str, variant: str, peak_gb: int, tmp_path: Path
) -> None:
    result = export_apart(name, variant, tmp_path)
    assert repository.check(result.repository) == []
    assert result.manifest(result.family.encoder.name)["peak_memory_mb"] < 1000 * peak_gb
    official = Remembering(result.predictor())
    with EmbeddedServer(result.repository, startup_timeout_s=600) as server:
        found = [
            difference
            for embedding in ("server", "client")
            # What the tracker's random weights make of some prompt may well be nothing.
            for difference in _assert_parity(
                *(server.url, result.family, official),
                degenerate=name == "sam3",
                embedding=embedding,
                timeout_s=600,
            )
        ]
    logits = max(difference.max_difference / difference.max_logit for difference in found)
    overlap = min(difference.mask_iou for difference in found)
    print(f"{name} {variant}: {len(found)} calls, logits {logits:.1e}, masks {overlap:.5f}")


def test_the_demo_model(tmp_path: Path) -> None:
    root = demo_repository()
    encoder, decoder = (root / model.name / "1/model.onnx" for model in SPEC.models)
    checkpoint = checkpoint_from_pair(encoder, decoder, "sam2.1_demo.yaml", tmp_path / "demo.pt")
    predictor = sam2.predictor(sam2.build_model("sam2.1_demo.yaml", checkpoint))
    with EmbeddedServer(root) as server:
        # What it makes of a mask prompt on 37×23 pixels may well be nothing.
        _assert_parity(server.url, SPEC, predictor, degenerate=True)


def _http_infer(client: object, model: str, inputs: Arrays, outputs: list[str]) -> Arrays:
    tensors = []
    for name, array in inputs.items():
        tensors.append(triton_http.InferInput(name, list(array.shape), "FP32"))
        tensors[-1].set_data_from_numpy(array)
    wanted = [triton_http.InferRequestedOutput(name) for name in outputs]
    result = client.infer(model, tensors, outputs=wanted)  # type: ignore[attr-defined]
    return {name: result.as_numpy(name) for name in outputs}


def test_a_client_that_knows_only_image_embeddings(
    exported: Exported, server: EmbeddedServer
) -> None:
    """Sends `image`, then the embedding with points, over HTTP: masks without fine features."""
    model = exported.model()
    image = np.random.default_rng(5).random((1, 3, 1024, 1024), np.float32)
    coords = np.array([[[500.0, 375.0], [100.0, 900.0]]], np.float32)
    labels = np.array([[1.0, 0.0]], np.float32)

    client = triton_http.InferenceServerClient(server.http_url)
    encoded = _http_infer(client, "sam2_encoder", {"image": image}, ["image_embeddings"])
    prompt = {"point_coords": coords, "point_labels": labels}
    names = ["masks", "iou_predictions"]
    answer = _http_infer(client, "sam2_decoder", encoded | prompt, names)
    client.close()

    with torch.no_grad():
        embedding, _, _ = sam2.Encoder(model, SPEC.image)(torch.from_numpy(image))
        sparse, dense = model.sam_prompt_encoder(  # type: ignore[operator]
            points=(torch.from_numpy(coords), torch.from_numpy(labels)), boxes=None, masks=None
        )
        decoder = model.sam_mask_decoder
        decoder.use_high_res_features = False  # type: ignore[union-attr]
        masks, scores, _, _ = decoder(  # type: ignore[operator]
            image_embeddings=embedding,
            image_pe=model.sam_prompt_encoder.get_dense_pe(),  # type: ignore[operator,union-attr]
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            repeat_image=False,
        )
    assert answer["masks"].shape == (1, 1, 256, 256)
    np.testing.assert_allclose(encoded["image_embeddings"], embedding.numpy(), atol=2e-5)
    scale = float(masks.abs().max())
    np.testing.assert_allclose(answer["masks"], masks.numpy(), atol=1e-4 * scale)
    np.testing.assert_allclose(answer["iou_predictions"], scores.numpy(), atol=1e-4)
