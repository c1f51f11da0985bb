"""The predictor's service and the client that talks to it, without Triton."""

from __future__ import annotations

import gc
import io
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeTransport, answer, f32, mean, photo
from PIL import Image
from predictors import FakeEngine, PredictorTransport, ask, predictor_of
from pycocotools import mask as coco

from triton_sam import (
    EmbeddingError,
    ImageError,
    InferenceError,
    InvalidInputError,
    ModelNotReadyError,
    PromptError,
    SAM2TritonClient,
)
from triton_sam.cache import EmbeddingCache, MemoryTier
from triton_sam.predictor import service
from triton_sam.predictor.messages import PredictorError, Request
from triton_sam.predictor.service import Predictor
from triton_sam.predictor.settings import Settings
from triton_sam.predictor.store import image_handle
from triton_sam.specs import FAMILIES, Family

SPEC = FAMILIES["sam2"]
LOOK = ("found", "handle", "original_size")
CLICK = ("found", "low_res_logits", "iou_predictions")


def png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def text(value: bytes) -> np.ndarray:
    return np.array([value], np.object_)


def point(x: float, y: float) -> dict[str, np.ndarray]:
    return {"point_coords": f32([[[x, y]]]), "point_labels": f32([[1]])}


@contextmanager
def running(family: Family = SPEC, **settings: Any) -> Iterator[tuple[Predictor, FakeEngine]]:
    predictor, engine = predictor_of(family, **settings)
    try:
        yield predictor, engine
    finally:
        engine.may_encode.set()
        engine.may_decode.set()
        predictor.close()


@pytest.fixture
def both() -> Iterator[tuple[Predictor, FakeEngine]]:
    with running() as found:
        yield found


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_client_gets_from_it_what_the_pair_gives(family: Family) -> None:
    image = photo(400, 300)
    pair = FakeTransport(family, lambda call: answer(family, call))
    with running(family) as (predictor, engine):
        way = PredictorTransport(predictor)
        with (
            SAM2TritonClient(transport=way, model_type=family.name) as client,
            SAM2TritonClient(transport=pair, model_type=family.name) as inline,
        ):
            client.set_image(png(image))
            inline.set_image(image)
            assert client.original_size == inline.original_size == (300, 400)
            for arguments in (
                {"point_coords": [[100, 50]], "point_labels": [1]},
                {"point_coords": [[100, 50]], "point_labels": [1], "multimask_output": True},
                {"point_coords": [[[1, 2]], [[3, 4]]], "point_labels": [[1], [0]]},
                {"box": [10, 20, 200, 300]},
                {"box": [[10, 20, 200, 300], [5, 5, 9, 9]]},
                {"box": [10, 20, 200, 300], "point_coords": [[9, 9]], "point_labels": [0]},
                {
                    "point_coords": [[30, 40]],
                    "point_labels": [1],
                    "mask_input": np.ones((1, *2 * [family.prompts.mask_size])),
                },
            ):
                own, official = client.segment(**arguments), inline.segment(**arguments)
                np.testing.assert_array_equal(own.masks, official.masks)
                np.testing.assert_array_equal(own.logits, official.logits)
                said = np.float32(mean(image, family))
                np.testing.assert_allclose(own.scores - said, official.scores, atol=1e-6)
            assert engine.encoded == 1


def test_an_image_is_sent_as_its_own_file_and_only_once(both: tuple[Predictor, FakeEngine]) -> None:
    predictor, engine = both
    content = png(photo())
    way = PredictorTransport(predictor)
    with SAM2TritonClient(transport=way) as client:
        client.set_image(content)
        client.set_image(content)
        client.predict([[1, 2]], [1])
        assert [sorted(call.inputs) for call in way.calls] == [
            ["image_handle"],
            ["encoded_image"],
            ["image_handle"],
            ["image_handle", "point_coords", "point_labels"],
        ]
        assert way.calls[1].inputs["encoded_image"][0] == content
        assert client.embedding.digest == image_handle(content)
    assert engine.encoded == 1


@pytest.mark.parametrize("how", ["path", "pil", "array", "grey"])
def test_every_kind_of_image_is_seen_alike(
    how: str, both: tuple[Predictor, FakeEngine], tmp_path: Path
) -> None:
    image = photo(40, 30)
    (tmp_path / "photo.png").write_bytes(png(image))
    grey = image[..., 0]
    sources: dict[str, Any] = {
        "path": tmp_path / "photo.png",
        "pil": Image.fromarray(image),
        "array": image,
        "grey": grey,
    }
    with SAM2TritonClient(transport=PredictorTransport(both[0])) as client:
        client.set_image(sources[how])
        _, scores = client.predict([[1, 2]], [1])
    seen = np.stack([grey] * 3, axis=-1) if how == "grey" else image
    np.testing.assert_allclose(scores, 0.5 + mean(seen, SPEC), atol=1e-6)


def test_a_forgotten_image_is_sent_again_by_itself() -> None:
    image, other = photo(seed=1), photo(seed=2)
    two = 2 * 4 * (256 * 64 * 64 + 32 * 256 * 256 + 64 * 128 * 128)
    with running(store_bytes=two) as (predictor, engine):
        way = PredictorTransport(predictor)
        with SAM2TritonClient(transport=way) as client:
            first = client.encode(image)
            before = client.predict([[1, 2]], [1], embedding=first)
            client.set_image(other)
            client.set_image(photo(seed=3))
            assert first.digest not in predictor.store
            after = client.predict([[1, 2]], [1], embedding=first)
            assert [sorted(call.inputs)[0] for call in way.calls[-2:]] == ["image_handle", "image"]
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])
    assert engine.encoded == 4


def test_two_that_send_the_same_image_at_once_have_it_encoded_once(
    both: tuple[Predictor, FakeEngine],
) -> None:
    predictor, engine = both
    engine.may_encode.clear()
    content = text(png(photo()))
    asked = [ask(predictor, LOOK, encoded_image=content) for _ in range(5)]
    asked.append(ask(predictor, (*LOOK, "iou_predictions"), encoded_image=content, **point(1, 2)))
    engine.may_encode.set()
    handles = {bytes(future.result(10)["handle"][0]) for future in asked}
    assert len(handles) == 1 and engine.encoded == 1
    assert asked[-1].result()["iou_predictions"].shape == (1, 1)


def test_an_unknown_handle_is_an_answer_to_who_asks_for_it(
    both: tuple[Predictor, FakeEngine],
) -> None:
    inputs = {"image_handle": text(b"nothing"), **point(1, 2)}
    found = ask(both[0], CLICK, **inputs).result(10)
    assert not found["found"][0]
    assert found["low_res_logits"].shape == (0, 0, 256, 256)
    with pytest.raises(PredictorError, match="no image 'nothing' here") as raised:
        ask(both[0], CLICK[1:], **inputs).result(10)
    assert raised.value.kind == "unknown"


def test_a_tenants_images_are_found_with_the_key_alone(both: tuple[Predictor, FakeEngine]) -> None:
    predictor, engine = both
    content = png(photo())
    for key in ("mine", "theirs", b"mine"):
        with SAM2TritonClient(transport=PredictorTransport(predictor), tenant_key=key) as client:
            client.set_image(content)
    assert engine.encoded == 2
    stranger = ask(predictor, LOOK, image_handle=text(image_handle(content).encode()))
    assert not stranger.result(10)["found"][0]


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of pycocotools itself
def test_every_form_of_a_mask_says_the_same(both: tuple[Predictor, FakeEngine]) -> None:
    predictor, _ = both
    image = photo(123, 77)
    wanted = ("low_res_logits", "low_res_bits", "masks_rle", "masks_bits", "original_size")
    points = {"point_coords": f32([[[60, 40]], [[10, 10]]]), "point_labels": f32([[1], [1]])}
    multimask = {"multimask_output": np.ones(1, bool)}
    asked = ask(predictor, wanted, image=image, **points, **multimask)
    found = asked.result(10)
    with SAM2TritonClient(transport=PredictorTransport(predictor)) as client:
        client.set_image(image)
        own = client.segment([[[60, 40]], [[10, 10]]], [[1], [1]], multimask_output=True)
    assert own.masks.any() and not own.masks.all()
    bits = np.unpackbits(found["masks_bits"], axis=-1, count=77 * 123)
    np.testing.assert_array_equal(bits.reshape(2, 3, 77, 123), own.masks)
    low = np.unpackbits(found["low_res_bits"], axis=-1).reshape(2, 3, 256, 256)
    np.testing.assert_array_equal(low, found["low_res_logits"] > 0)
    for row, column in np.ndindex(2, 3):
        counts = found["masks_rle"][row, column]
        np.testing.assert_array_equal(
            coco.decode({"size": [77, 123], "counts": counts}), own.masks[row, column]
        )
    assert found["original_size"].tolist() == [77, 123]


def test_only_what_was_asked_for_is_sent_back(both: tuple[Predictor, FakeEngine]) -> None:
    asked = ask(both[0], ("iou_predictions",), image=photo(), **point(1, 2))
    assert list(asked.result(10)) == ["iou_predictions"]


def test_requests_about_one_image_are_decoded_together_and_answered_apart() -> None:
    with running(gather=8) as (predictor, engine):
        handle = ask(predictor, LOOK, image=photo()).result(10)["handle"]
        engine.may_decode.clear()
        first = ask(predictor, CLICK, image_handle=handle, **point(50, 50))
        time.sleep(0.1)  # the first one is being decoded: these wait
        others = [
            ask(predictor, CLICK, image_handle=handle, **point(10 * i, 20)) for i in range(1, 9)
        ]
        engine.may_decode.set()
        for future in (first, *others):
            assert future.result(10)["found"][0]
    assert [len(call.inputs["point_coords"]) for call in engine.decoded] == [1, 8]
    for i, future in enumerate(others, 1):
        peak = np.unravel_index(future.result()["low_res_logits"][0, 0].argmax(), (256, 256))
        np.testing.assert_allclose(peak, (20 * 256 / 300, 10 * i * 256 / 400), atol=1)


def test_many_prompts_are_decoded_in_parts() -> None:
    coords = np.random.default_rng(0).uniform(0, 300, (19, 1, 2)).astype(np.float32)
    with (
        running(gather=8) as (predictor, engine),
        SAM2TritonClient(transport=PredictorTransport(predictor)) as client,
    ):
        client.set_image(photo())
        masks, scores = client.predict(coords, np.ones((19, 1)))
    assert masks.shape == (19, 1, 256, 256) and scores.shape == (19, 1)
    assert [len(call.inputs["point_coords"]) for call in engine.decoded] == [8, 8, 3]
    for (x, y), mask in zip(coords[:, 0], masks[:, 0], strict=True):
        expected = (min(255, y * 256 / 300), min(255, x * 256 / 400))
        # The client's logits are clamped, so that a plateau stands where the peak was.
        plateau = np.argwhere(mask == mask.max()).mean(axis=0)
        if min(expected) > 12 and max(expected) < 243:
            np.testing.assert_allclose(plateau, expected, atol=1.5)


def many(count: int, y: float = 20) -> dict[str, np.ndarray]:
    """Prompts at one height."""
    points = [[[300 * i / count, y]] for i in range(count)]
    return {"point_coords": f32(points), "point_labels": np.ones((count, 1), np.float32)}


@contextmanager
def decoding_stepwise(
    **settings: Any,
) -> Iterator[tuple[Predictor, np.ndarray, threading.Semaphore, list[float]]]:
    """With an image's handle, a semaphore for each run of the decoder, and each run's height."""
    steps, seen = threading.Semaphore(0), list[float]()
    with running(**settings) as (predictor, engine):
        handle = ask(predictor, LOOK, image=photo()).result(10)["handle"]
        decode = engine.decode

        def stepwise(call: Any) -> Any:
            seen.append(round(float(call.inputs["point_coords"][0, 0, 1]) * 300 / 1024))
            assert steps.acquire(timeout=10)
            return decode(call)

        engine.decode = stepwise  # type: ignore[method-assign]
        try:
            yield predictor, handle, steps, seen
        finally:
            steps.release(10_000)


def broken(call: Any) -> Any:
    raise RuntimeError("it broke")


@pytest.mark.parametrize(
    ("inputs", "breaks", "kind"),
    [
        (lambda: {"image": photo(), **point(5, 5)}, "", None),
        (lambda: {"encoded_image": text(png(photo())), **point(5, 5)}, "", None),
        (lambda: {"encoded_image": text(b"no image"), **point(5, 5)}, "", "invalid"),
        (lambda: {"image": np.zeros((0, 5, 3), np.uint8), **point(5, 5)}, "", "invalid"),
        (lambda: {"image": photo(), **point(np.nan, 5)}, "", "invalid"),
        (lambda: {"image": photo(), "image_handle": text(b""), "boxes": f32([1])}, "", "invalid"),
        (lambda: {"image": photo(), **point(5, 5)}, "encode", "failed"),
        (lambda: {"image": photo(), **point(5, 5)}, "decode", "failed"),
        (lambda: {"image_handle": text(b"x"), **point(5, 5)}, "", "unknown"),
        (lambda: {"point_coords": f32([[[5, 5]]])}, "", "invalid"),
    ],
)
def test_a_request_is_let_go_of_once_it_is_answered(
    inputs: Callable[[], dict[str, np.ndarray]],
    breaks: str,
    kind: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its arrays lie in memory that Triton lends, and has taken back when the process ends."""
    monkeypatch.setattr(service.logger, "disabled", True)  # pytest keeps what is logged
    with running() as (predictor, engine):
        if breaks:
            setattr(engine, breaks, broken)
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        given = inputs()
        lent = [weakref.ref(array) for array in given.values()]
        gc.disable()
        try:
            outputs = frozenset(("handle", "low_res_logits"))
            predictor.submit(Request(given, outputs, answers.put))
            del given
            assert getattr(answers.get(timeout=10), "kind", None) == kind
            engine.decoded.clear()
            until(lambda: not any(array() is not None for array in lent))
        finally:
            gc.enable()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("gather", [1, 8])
def test_a_click_gets_in_between_the_parts_of_a_request_with_many_prompts(gather: int) -> None:
    outputs = ("iou_predictions", "low_res_bits")
    prompts = many(1024)
    with decoding_stepwise(gather=gather) as (predictor, handle, steps, seen):
        long = ask(predictor, outputs, image_handle=handle, **prompts)
        for turn in range(3):
            until(lambda runs=2 * turn + 1: len(seen) == runs)  # type: ignore[misc]
            click = ask(predictor, CLICK, image_handle=handle, **point(9, 250))
            steps.release(2)  # the part that runs already, and the click
            assert click.result(10)["found"][0]
        until(lambda: len(seen) == 7)
        assert seen == [*3 * [20, 250], 20]
        steps.release(10_000)
        found = long.result(60)
        for row in (0, 7, 8, 500, 1023):
            own = {name: array[row : row + 1] for name, array in prompts.items()}
            alone = ask(predictor, outputs, image_handle=handle, **own).result(10)
            for name in outputs:
                np.testing.assert_array_equal(found[name][row : row + 1], alone[name])
    assert len(seen) == 1024 // gather + 3 + 5


@pytest.mark.parametrize("kind", ["cancelled", "late"])
def test_a_request_with_many_prompts_that_nobody_waits_for_stops_at_the_next_part(
    kind: str,
) -> None:
    gone = threading.Event()
    with decoding_stepwise() as (predictor, handle, steps, seen):
        late = {"deadline_ms": np.array([300], np.int32)} if kind == "late" else {}
        long = ask(
            predictor, CLICK, image_handle=handle, **many(1024), **late, cancelled=gone.is_set
        )
        steps.release(2)
        until(lambda: len(seen) == 3)
        if kind == "late":
            time.sleep(0.4)
        else:
            gone.set()
        steps.release(1)
        assert getattr(long.exception(10), "kind", None) == kind
        assert len(seen) == 3 and predictor.counts()["dropped"] == 1
        steps.release(1)
        assert ask(predictor, CLICK, image_handle=handle, **point(1, 9)).result(10)["found"][0]
        # Its room is free again.
        steps.release(2048)
        again = ask(predictor, CLICK, image_handle=handle, **many(1024))
        assert again.result(60)["iou_predictions"].shape == (1024, 1)


def test_only_so_many_prompts_are_begun_at_a_time() -> None:
    hover = {"priority": np.array([1], np.int32)}
    with decoding_stepwise(max_begun=12) as (predictor, handle, steps, seen):
        asked = [ask(predictor, CLICK, image_handle=handle, **many(8, y=10), **hover)]
        until(lambda: len(seen) == 1)
        asked += [
            # Another ten would be too many, beside what has begun; two are not. Of its own
            # priority a request is the first, and goes before all others.
            ask(predictor, CLICK, image_handle=handle, **many(10, y=20), **hover),
            ask(predictor, CLICK, image_handle=handle, **many(2, y=30), **hover),
            ask(predictor, CLICK, image_handle=handle, **many(8, y=40)),
        ]
        steps.release(100)
        for future, count in zip(asked, (8, 10, 2, 8), strict=True):
            assert future.result(10)["iou_predictions"].shape == (count, 1)
    assert seen == [10, *8 * [40], 30, 10, 30, *6 * [10], *10 * [20]]


def test_many_prompts_are_answered_though_their_image_is_evicted_meanwhile() -> None:
    two = 2 * 4 * (256 * 64 * 64 + 32 * 256 * 256 + 64 * 128 * 128)
    with decoding_stepwise(store_bytes=two) as (predictor, handle, steps, seen):
        long = ask(predictor, CLICK, image_handle=handle, **many(4))
        steps.release(1)
        until(lambda: len(seen) == 2)
        for seed in (1, 2):
            assert ask(predictor, LOOK, image=photo(seed=seed)).result(10)["found"][0]
        assert bytes(handle[0]).decode() not in predictor.store
        steps.release(3)
        scores = long.result(10)["iou_predictions"]
    np.testing.assert_allclose(scores, 0.5 + mean(photo(), SPEC), atol=1e-6)


def test_cancelled_and_late_requests_are_not_decoded(both: tuple[Predictor, FakeEngine]) -> None:
    predictor, engine = both
    handle = ask(predictor, LOOK, image=photo()).result(10)["handle"]
    engine.may_decode.clear()
    gone = threading.Event()
    asked = [
        ask(predictor, CLICK, image_handle=handle, **point(i, i), cancelled=gone.is_set)
        for i in range(100)
    ]
    late = ask(
        predictor, CLICK, image_handle=handle, **point(1, 1), deadline_ms=np.array([1], np.int32)
    )
    wanted = ask(predictor, CLICK, image_handle=handle, **point(7, 9))
    time.sleep(0.05)
    gone.set()
    engine.may_decode.set()
    assert wanted.result(10)["found"][0]
    kinds = [getattr(future.exception(10), "kind", "answered") for future in asked]
    assert kinds.count("cancelled") >= 91 and len(engine.decoded) <= 3
    assert getattr(late.exception(10), "kind", None) == "late"
    assert predictor.counts()["dropped"] == kinds.count("cancelled") + 1


def test_a_click_overtakes_the_hovers_that_wait() -> None:
    with running() as (predictor, engine):
        handle = ask(predictor, LOOK, image=photo()).result(10)["handle"]
        engine.may_decode.clear()
        hover = {"priority": np.array([1], np.int32)}
        hovers = [
            ask(predictor, CLICK, image_handle=handle, **point(i, 1), **hover) for i in range(50)
        ]
        click = ask(predictor, CLICK, image_handle=handle, **point(9, 250))
        engine.may_decode.set()
        click.result(10)
        for future in hovers:
            future.result(10)
    order = [call.inputs["point_coords"][0, 0, 1] > 500 for call in engine.decoded]
    assert order.index(True) <= 1


def test_a_full_queue_is_said(both: tuple[Predictor, FakeEngine]) -> None:
    with running(max_waiting=2) as (predictor, engine):
        handle = ask(predictor, LOOK, image=photo()).result(10)["handle"]
        engine.may_decode.clear()
        asked = [ask(predictor, CLICK, image_handle=handle, **point(i, 1)) for i in range(6)]
        engine.may_decode.set()
        kinds = [getattr(future.exception(10), "kind", "answered") for future in asked]
    assert kinds.count("busy") >= 3 and kinds[0] == "answered"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "A request names an image"),
        ({"image": photo(), "encoded_image": text(b"x")}, "encoded_image or image, not both"),
        ({"encoded_image": text(b"nothing like an image")}, "not an image in a known format"),
        ({"encoded_image": text(png(photo())[:500])}, "Cannot read the image of 500 bytes"),
        ({"encoded_image": np.array([b"a", b"b"], object)}, "encoded_image is one value; got 2"),
        ({"image": photo(), **point(float("nan"), 1)}, "point_coords must be finite"),
        ({"image": photo(), **point(9999, 1)}, "lies outside the image of 400x300"),
        ({"image": photo(), "point_coords": f32([[[1, 1]]])}, "point_labels is missing"),
        ({"image": photo(), "point_coords": f32(np.zeros((1, 10_000, 2)))}, "10000 points"),
        ({"image": photo(), "point_coords": f32(np.zeros((1, 600, 2)))}, "has 600 points"),
        ({"image": photo(), "boxes": f32(np.ones((2000, 4)))}, "has 2000 prompts"),
        ({"image": photo(), "priority": np.array([7], np.int32)}, "priority is one of 0"),
        ({"image": photo(), "deadline_ms": np.array([0], np.int32)}, "deadline_ms must be"),
        ({"image": np.zeros((0, 5, 3), np.uint8)}, "The image is empty: 5x0"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(
    inputs: dict[str, Any], message: str, both: tuple[Predictor, FakeEngine]
) -> None:
    predictor, _ = both
    with pytest.raises(PredictorError, match=message) as raised:
        ask(predictor, CLICK, **inputs).result(10)
    assert raised.value.kind == "invalid" and "\n" not in str(raised.value)
    assert ask(predictor, CLICK, image=photo(), **point(1, 2)).result(10)["found"][0]


def test_an_image_over_the_limit_is_refused_before_it_is_decoded() -> None:
    data = io.BytesIO()
    Image.new("1", (20000, 20000)).save(data, "PNG")
    with running() as (predictor, engine):
        with pytest.raises(PredictorError, match="400000000 pixels"):
            ask(predictor, LOOK, encoded_image=text(data.getvalue())).result(10)
        with (
            SAM2TritonClient(transport=PredictorTransport(predictor)) as client,
            pytest.raises(ImageError, match="400000000 pixels"),
        ):
            client.set_image(data.getvalue())
        assert engine.encoded == 0


def test_a_damaged_image_is_an_image_error_of_the_client(
    both: tuple[Predictor, FakeEngine],
) -> None:
    with SAM2TritonClient(transport=PredictorTransport(both[0])) as client:
        with pytest.raises(ImageError, match=r"^Cannot read the image of \d+ bytes"):
            client.set_image(png(photo())[:-2000])
        with pytest.raises(ImageError, match="known format"):
            client.set_image(b"not an image")
        with pytest.raises(ImageError, match="No such file"):
            client.set_image("missing.jpg")
        client.set_image(photo())
        with pytest.raises(PromptError, match="outside"):
            client.predict([[1000, 1]], [1])


def test_a_failing_decoder_fails_that_request_alone(both: tuple[Predictor, FakeEngine]) -> None:
    predictor, engine = both
    decode, failures = engine.decode, [RuntimeError("no memory")]

    def failing(call: Any) -> Any:
        if failures:
            raise failures.pop()
        return decode(call)

    engine.decode = failing  # type: ignore[method-assign]
    with SAM2TritonClient(transport=PredictorTransport(predictor)) as client:
        client.set_image(photo())
        with pytest.raises(InferenceError, match="RuntimeError: no memory"):
            client.predict([[1, 1]], [1])
        masks, _ = client.predict([[1, 1]], [1])
    assert masks.shape == (1, 1, 256, 256)


def test_an_answer_that_cannot_be_sent_keeps_no_other_from_being_sent(
    both: tuple[Predictor, FakeEngine],
) -> None:
    predictor, _ = both

    def broken(given: object) -> None:
        raise RuntimeError("the connection is gone")

    handle = ask(predictor, LOOK, image=photo()).result(10)["handle"]
    click = {"image_handle": handle, **point(1, 2)}
    predictor.submit(Request(click, frozenset(CLICK), broken))
    predictor.submit(Request(click, frozenset(CLICK), broken, is_cancelled=lambda: True))
    predictor.submit(Request({"image": photo(seed=3)}, frozenset(LOOK), broken))
    assert ask(predictor, CLICK, **click).result(10)["found"][0]
    assert ask(predictor, LOOK, image=photo(seed=4)).result(10)["found"][0]


def test_the_end_answers_what_waits() -> None:
    predictor, engine = predictor_of(SPEC)
    engine.may_encode.clear()
    asked = [ask(predictor, CLICK, image=photo(seed=i), **point(1, 2)) for i in range(3)]
    closing = threading.Thread(target=predictor.close)
    closing.start()
    engine.may_encode.set()
    closing.join(20)
    assert not closing.is_alive()
    assert all(future.result(0)["found"][0] for future in asked)


def test_every_request_for_an_image_is_counted_once(both: tuple[Predictor, FakeEngine]) -> None:
    predictor, _ = both
    handle = ask(predictor, LOOK, image=photo()).result(10)["handle"]
    before = predictor.counts()
    for _ in range(3):
        ask(predictor, CLICK, image_handle=handle, **point(1, 2)).result(10)
    ask(predictor, CLICK, image_handle=text(b"nothing"), **point(1, 2)).result(10)
    after = predictor.counts()
    assert after["store_hits"] - before["store_hits"] == 3
    assert after["store_misses"] - before["store_misses"] == 1
    assert after["decodes"] - before["decodes"] == 3 and after["waiting"] == 0


def test_where_embeddings_are_kept_can_be_said(both: tuple[Predictor, FakeEngine]) -> None:
    way = PredictorTransport(both[0])
    with SAM2TritonClient(transport=way, embedding="server") as client:
        client.set_image(photo())
        assert client.is_ready()
        with pytest.raises(EmbeddingError, match="cannot be saved"):
            client.embedding.to_bytes()
    with SAM2TritonClient(transport=way, embedding="client") as client:
        assert not client.is_ready()
    with pytest.raises(InvalidInputError, match="embedding is one of 'auto', 'server', 'client'"):
        SAM2TritonClient(transport=way, embedding="here")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="Give one of the two"):
        SAM2TritonClient(
            transport=way, embedding="server", cache=EmbeddingCache(MemoryTier(max_bytes=1))
        )


def test_a_predictor_that_comes_and_goes_is_noticed() -> None:
    pair = FakeTransport(SPEC, lambda call: answer(SPEC, call))
    with running() as (predictor, _):
        way = PredictorTransport(predictor)
        serves = [False]

        class Changing(FakeTransport):
            def served(self, model: str, timeout_s: float | None = None) -> Any:
                return (way if serves[0] and model == way.model.name else pair).served(model)

            def infer(self, call: Any, timeout_s: float | None = None) -> Any:
                if call.model != way.model.name:
                    return pair.infer(call)
                if not serves[0]:
                    raise ModelNotReadyError("There is none any more.")
                return way.infer(call)

        with SAM2TritonClient(transport=Changing(SPEC, lambda call: {})) as client:
            kinds = []
            for serves[0] in (False, True, True):
                client.set_image(photo())
                kinds.append(type(client.embedding).__name__)
            serves[0] = False
            with pytest.raises(ModelNotReadyError):
                client.predict([[1, 1]], [1])
            client.set_image(photo())
            kinds.append(type(client.embedding).__name__)
    assert kinds == ["Embedding", "ServerEmbedding", "ServerEmbedding", "Embedding"]


def test_a_segmentation_shows_itself_over_the_picture(both: tuple[Predictor, FakeEngine]) -> None:
    image = np.full((30, 40, 3), 200, np.uint8)
    with SAM2TritonClient(transport=PredictorTransport(both[0])) as client:
        client.set_image(png(image))
        shown = Image.open(io.BytesIO(client.segment([[5, 5]], [1])._repr_png_()))
    assert shown.size == (40, 30) and shown.getpixel((39, 29)) == (200, 200, 200)


def test_settings_come_from_the_environment() -> None:
    settings = Settings.read({"TRITON_SAM_STORE_MB": "64", "TRITON_SAM_STORE_TTL_S": ""}, False)
    assert (settings.store_bytes, settings.ttl_s) == (64_000_000, 3600)
    assert (settings.encoders, settings.gather) == (1, 1)
    on_gpu = Settings.read({}, True)
    assert (on_gpu.store_bytes, on_gpu.encoders, on_gpu.gather) == (4_096_000_000, 4, 8)
    with pytest.raises(InvalidInputError, match="TRITON_SAM_QUEUE is 'many'"):
        Settings.read({"TRITON_SAM_QUEUE": "many"}, False)
    with pytest.raises(InvalidInputError, match="expected 33554432 or more"):
        predictor_of(SPEC, store_bytes=10)
