"""The predictor inside a real Triton: what only the server can show."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SPEC, Exported
from fakes import f32, photo
from PIL import Image
from soak_store import read_metrics
from test_predictor_service import CLICK, LOOK, png, point, text

from triton_sam import (
    InferenceError,
    SAM2TritonClient,
    SpeculativeSAM2Client,
    queue_multiple_requests,
    wait_for_latest_result,
)
from triton_sam.benchmark.wire import CountingProxy
from triton_sam.demo import demo_photo, demo_repository
from triton_sam.errors import ModelNotReadyError, RepositoryError
from triton_sam.export.parity import OnnxRuntimeTransport
from triton_sam.protocol import Arrays, Call
from triton_sam.repository import check
from triton_sam.server import EmbeddedServer
from triton_sam.server.install import Installation
from triton_sam.server.models import Models
from triton_sam.server.run import RunFolder
from triton_sam.specs.predictor import predictor_model
from triton_sam.transport import Endpoint, Transport, open_transport

MODEL = predictor_model(SPEC).name


@pytest.fixture
def way(server: EmbeddedServer) -> Iterator[Transport]:
    transport = open_transport(server.url)
    yield transport
    transport.close()


def ask(way: Transport, outputs: tuple[str, ...], **inputs: Any) -> Arrays:
    return way.infer(Call(MODEL, inputs, outputs), 60)


def counted(server: EmbeddedServer, metric: str) -> float:
    return read_metrics(server.metrics_url)[metric]


def settled(server: EmbeddedServer, metric: str, at_least: float) -> float:
    """The metric once it has come that far; the page is up to a second behind."""
    end = time.monotonic() + 10
    while (value := counted(server, metric)) < at_least and time.monotonic() < end:
        time.sleep(0.1)
    return value


def test_an_exported_repository_has_a_predictor_that_is_right(exported: Exported) -> None:
    assert check(exported.repository) == []
    config = exported.repository / MODEL / "config.pbtxt"
    text = config.read_text()
    config.write_text(text.replace("uint8", "").replace("TYPE_UINT8", "TYPE_INT8"))
    try:
        assert [str(problem) for problem in check(exported.repository)] == [
            f"{MODEL}: config.pbtxt differs from the table; run `triton-sam configure`."
        ]
    finally:
        config.write_text(text)


def test_a_click_is_a_few_hundred_bytes() -> None:
    image = np.asarray(demo_photo())
    with EmbeddedServer(demo_repository()) as server:
        for url in (server.url, f"http://{server.http_url}"):
            with (
                CountingProxy(Endpoint.parse(url)) as proxy,
                closing(open_transport(proxy.url)) as way,
            ):
                handle = ask(way, LOOK, image=image)["handle"]
                for form in ("low_res_bits", "masks_rle"):
                    outputs = ("found", form, "iou_predictions")
                    ask(way, outputs, image_handle=handle, **point(300, 168))
                    before = proxy.total
                    for _ in range(10):
                        ask(way, outputs, image_handle=handle, **point(300, 168))
                    passed = proxy.total - before
                    assert 1000 < passed.up <= 10 * 1000
                    assert 1000 < passed.down <= 10 * 20_000


def test_it_is_served_without_its_pair() -> None:
    pair = {model.name: demo_repository() / model.name / "1" / model.file for model in SPEC.models}
    with EmbeddedServer(demo_repository(), models=["*_predictor"]) as server:
        answers = []
        for way in (open_transport(server.url), OnnxRuntimeTransport(pair)):
            with SAM2TritonClient(transport=way) as client:
                client.set_image(demo_photo())
                answers.append(client.predict([[300, 168]], [1])[0])
        assert np.abs(answers[0] - answers[1]).max() <= 1e-4 * np.abs(answers[1]).max()
        with closing(open_transport(server.url)) as way, pytest.raises(ModelNotReadyError):
            way.check_ready([SPEC.encoder.name])
    with pytest.raises(RepositoryError, match="models is 'sam9_\\*', which fits none of sam2_deco"):
        EmbeddedServer(demo_repository(), models=["sam9_*"]).start()


def test_its_counts_are_on_the_page_of_metrics(server: EmbeddedServer, way: Transport) -> None:
    image = photo(seed=int(time.time()))
    time.sleep(1.5)  # the page is up to a second behind
    encodes, decodes = counted(server, "encodes_total"), counted(server, "decodes_total")
    handle = ask(way, LOOK, image=image)["handle"]
    ask(way, LOOK, image=image)
    ask(way, CLICK, image_handle=handle, **point(5, 5))
    assert settled(server, "decodes_total", decodes + 1) == decodes + 1
    assert counted(server, "encodes_total") == encodes + 1
    assert counted(server, "store_images") >= 1
    assert counted(server, "store_bytes") >= 16_777_216


def test_its_process_ends_as_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics that it destroys would crash it, and arrays of requests that it still holds."""
    ends, fill = tmp_path / "ends", RunFolder.fill

    def watched(folder: RunFolder, installation: Installation, models: Models) -> None:
        fill(folder, installation, models)
        stub = folder.backends / "python" / "triton_python_backend_stub"
        program = stub.rename(stub.with_name("program"))
        stub.write_text(f'#!/bin/sh\n"{program}" "$@"\necho $? "$@" >> "{ends}"\n')
        stub.chmod(0o755)

    monkeypatch.setattr(RunFolder, "fill", watched)
    with EmbeddedServer(demo_repository(), models=["*_predictor"]) as server:
        counted(server, "encodes_total")
        with closing(open_transport(server.url)) as way:
            for outputs in (LOOK, CLICK):
                with pytest.raises(InferenceError, match="Cannot read"):
                    ask(way, outputs, encoded_image=text(b"no image"), **point(5, 5))
    (status,) = [line.split()[0] for line in ends.read_text().splitlines() if MODEL in line]
    assert status == "0"


def test_of_a_hundred_clicks_that_wait_the_cancelled_are_not_decoded(
    server: EmbeddedServer,
) -> None:
    rng = np.random.default_rng(0)
    # A mask prompt each, so that none are decoded together.
    coords = list(rng.uniform(5, 95, (100, 1, 2)))
    time.sleep(1.5)  # the page is up to a second behind
    before = counted(server, "decodes_total")

    async def burst() -> tuple[int, int]:
        async with SpeculativeSAM2Client(server.url, timeout_s=120) as client:
            embedding = await client.encode(photo(100, 100))
            mask, _ = await client.predict(coords[0], [1], embedding=embedding)
            expected, _ = await client.predict(
                coords[-1], [1], mask_input=mask, embedding=embedding
            )
            tasks = [
                asyncio.create_task(client.predict(one, [1], mask_input=mask, embedding=embedding))
                for one in coords
            ]
            await asyncio.sleep(0.5)
            done = sum(task.done() for task in tasks)
            for task in tasks[:-1]:
                task.cancel()
            masks, _ = await tasks[-1]
            np.testing.assert_array_equal(masks, expected)
            await asyncio.gather(*tasks, return_exceptions=True)
            return done, sum(task.cancelled() for task in tasks)

    done, cancelled = asyncio.run(burst())
    assert cancelled == 99 - done >= 50
    time.sleep(1.5)
    # Two before the burst; one that ran when the others were cancelled, and the last one.
    executed = counted(server, "decodes_total") - before - 2 - done
    assert executed <= 2 + 1


def test_sessions_and_hovers_work_over_it(server: EmbeddedServer) -> None:
    async def hover_across() -> None:
        async with SpeculativeSAM2Client(server.url) as client:
            image = await client.encode(photo(100, 100))
            tasks = await queue_multiple_requests(
                client, [[[10, 10]], [[20, 20]]], [[1], [1]], "s", embedding=image
            )
            masks, _ = await wait_for_latest_result(tasks, client, "s")
            expected, _ = await client.predict([[20, 20]], [1], embedding=image)
            # Decoded together with others, which changes the last bits.
            np.testing.assert_allclose(masks, expected, atol=1e-4)
            async with client.hover(image) as hover:
                for x in range(10, 60):
                    hover.move(x, 50)
                    await asyncio.sleep(1 / 60)
                last = await hover.settled()
            masks, _ = await client.predict([[59, 50]], [1], embedding=image)
            assert last.x == 59
            np.testing.assert_allclose(last.masks, masks, atol=1e-4)

    asyncio.run(hover_across())


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_restarted_server_is_sent_the_image_again(exported: Exported, protocol: str) -> None:
    server = EmbeddedServer(exported.repository)
    server.start()
    try:
        http, grpc = (int(url.rsplit(":")[-1]) for url in (server.http_url, server.grpc_url))
        url = server.url if protocol == "grpc" else f"http://{server.http_url}"
        with SAM2TritonClient(url, timeout_s=60) as client:
            client.set_image(photo())
            before, _ = client.predict([[100, 100]], [1])
            server.stop()
            server = EmbeddedServer(exported.repository, http_port=http, grpc_port=grpc)
            server.start()
            after, _ = client.predict([[100, 100]], [1])
        np.testing.assert_array_equal(before, after)
    finally:
        server.stop()


def test_a_click_does_not_wait_for_the_image_of_another(server: EmbeddedServer) -> None:
    """Clicks are answered while the encoder runs, not after it."""
    stop = threading.Event()

    def encode() -> None:
        with SAM2TritonClient(server.url) as other:
            seed = 0
            while not stop.is_set():
                seed += 1
                other.set_image(photo(seed=1000 + seed))

    with SAM2TritonClient(server.url) as client:
        client.set_image(photo())
        client.predict([[5, 5]], [1])
        before = counted(server, "encodes_total")
        thread = threading.Thread(target=encode)
        thread.start()
        time.sleep(0.5)
        clicks = 0
        end = time.monotonic() + 4
        while time.monotonic() < end:
            client.predict([[5, 5]], [1])
            clicks += 1
        stop.set()
        thread.join()
    encodes = settled(server, "encodes_total", before + 1) - before
    assert clicks > 2 * encodes >= 2


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"encoded_image": text(png(photo())[:700])}, "Cannot read the image of 700 bytes"),
        ({"encoded_image": text(b"GIF89a but not really")}, "Cannot read the image"),
        ({"image": photo(), **point(float("nan"), 1)}, "must be finite"),
        ({"image": photo(), "point_coords": f32(np.zeros((1, 10_000, 2)))}, "10000 points"),
        ({"image_handle": text(b"\xff\xfe"), **point(1, 1)}, "There is no image"),
        ({"image": f32(photo())}, "FP32"),
        ({"nonsense": f32([1])}, "nonsense"),
        ({**point(1, 1)}, "A request names an image"),
    ],
)
def test_hostile_requests_are_refused_and_the_next_good_one_is_right(
    inputs: dict[str, Any], message: str, way: Transport
) -> None:
    outputs = ("low_res_logits", "iou_predictions")
    good = {"image": photo(), **point(100, 100)}
    before = ask(way, outputs, **good)
    with pytest.raises(InferenceError, match=message):
        ask(way, outputs, **inputs)
    np.testing.assert_array_equal(
        ask(way, outputs, **good)["low_res_logits"], before["low_res_logits"]
    )


def test_the_smallest_image_and_one_that_claims_to_be_huge(way: Transport) -> None:
    tiny = ask(way, CLICK, image=np.zeros((1, 1, 3), np.uint8), **point(0, 0))
    assert tiny["low_res_logits"].shape == (1, 1, 256, 256)
    data = io.BytesIO()
    Image.new("1", (20000, 20000)).save(data, "PNG")
    with pytest.raises(InferenceError, match="400000000 pixels"):
        ask(way, LOOK, encoded_image=text(data.getvalue()))


def test_a_predictor_without_its_pair_is_left_out(exported: Exported, tmp_path: Path) -> None:
    import shutil

    from triton_sam.server.models import find_models

    root = Path(shutil.copytree(exported.repository, tmp_path / "models"))
    (root / "sam2_decoder" / "1" / "model.onnx").unlink()
    models = find_models(root)
    assert models.names == ("sam2_encoder",)
    assert models.skipped[MODEL] == "it runs sam2_decoder"
