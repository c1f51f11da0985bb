"""The client over a transport that is a function, and beside the official predictor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from triton_sam import (
    ClientClosedError,
    ImageError,
    ImageNotSetError,
    InferenceError,
    InvalidInputError,
    ModelNotReadyError,
    PromptError,
    SAM2TritonClient,
    ServerTimeoutError,
    ServerUnavailableError,
)
from triton_sam.images import load_image, preprocess
from triton_sam.protocol import Arrays, Call, Served
from triton_sam.specs import FAMILIES, Family

Answer = Callable[[Call], Arrays]
FIRST = next(iter(FAMILIES.values()))


def f32(values: ArrayLike) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


class FakeTransport:
    """Answers calls with a function and keeps them."""

    def __init__(self, family: Family, answer: Answer) -> None:
        self.answer = answer
        self.calls: list[Call] = []
        self.asked: list[str] = []
        self.not_ready: list[Exception] = []
        self.closed = 0
        self.models = {
            model.name: Served(
                frozenset(t.name for t in model.inputs), frozenset(t.name for t in model.outputs)
            )
            for model in family.models
        }

    def infer(self, call: Call) -> Arrays:
        self.calls.append(call)
        return self.answer(call)

    def served(self, model: str) -> Served:
        self.asked.append(model)
        return self.models[model]

    def check_ready(self, models: Sequence[str], timeout_s: float | None = None) -> None:
        assert list(models) == list(self.models)
        if self.not_ready:
            raise self.not_ready.pop(0)

    def close(self) -> None:
        self.closed += 1


def answer(family: Family, call: Call) -> Arrays:
    """An encoder that says the mean of the image; a decoder whose mask is a disc at the point."""
    if call.model == family.encoder.name:
        mean = call.inputs[family.encoder.inputs[0].name].astype(np.float64).mean()
        return {
            tensor.name: np.full([abs(n) for n in tensor.dims], mean, np.float32)
            for tensor in family.encoder.outputs
            if tensor.name in call.outputs
        }
    layout, side = family.prompts, family.prompts.mask_size
    points = f32(call.inputs[layout.points]) * f32(side / family.image.size)
    masks = 3 if layout.multimask in call.inputs else 1
    y, x = np.mgrid[:side, :side] + 0.5
    discs = [60 - 3 * np.hypot(x - px, y - py) for px, py in points[:, 0]]
    logits = np.repeat(np.stack(discs)[:, None], masks, axis=1).astype(np.float32)
    scores = np.tile(np.linspace(0.5, 0.9, masks, dtype=np.float32), (len(points), 1))
    return {family.masks: logits, family.scores: scores}


@pytest.fixture(params=list(FAMILIES.values()), ids=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


@pytest.fixture
def transport(family: Family) -> FakeTransport:
    return FakeTransport(family, lambda call: answer(family, call))


@pytest.fixture
def client(family: Family, transport: FakeTransport) -> Iterator[SAM2TritonClient]:
    with SAM2TritonClient(model_type=family.name, transport=transport) as client:
        yield client


def photo(width: int = 400, height: int = 300, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_an_image_is_encoded_once(
    client: SAM2TritonClient, transport: FakeTransport, family: Family
) -> None:
    client.set_image(photo())
    for _ in range(3):
        client.predict([[10, 20]], [1])
    assert [call.model for call in transport.calls] == [
        family.encoder.name,
        *[family.decoder.name] * 3,
    ]
    assert transport.asked == [family.encoder.name, family.decoder.name]
    sent = transport.calls[0].inputs[family.encoder.inputs[0].name]
    np.testing.assert_array_equal(sent, preprocess(load_image(photo()), family.image))


def test_the_embedding_goes_to_the_decoder(
    client: SAM2TritonClient, transport: FakeTransport, family: Family
) -> None:
    for value in (0, 255):
        client.set_image(np.full((4, 5, 3), value, np.uint8))
        client.predict(box=[1, 1, 3, 3])
        for tensor in family.encoder.outputs:
            assert (transport.calls[-1].inputs[tensor.name] == value / 255).all()


def test_predict_clamps_and_segment_does_not(client: SAM2TritonClient, family: Family) -> None:
    client.set_image(photo())
    logits, scores = client.predict([[200, 150]], [1])
    side, clip = family.prompts.mask_size, family.prompts.mask_clip
    assert logits.dtype == np.float32 and logits.shape == (1, 1, side, side)
    assert scores.dtype == np.float32 and scores.tolist() == [[0.5]]
    assert logits.max() == clip and logits.min() == -clip

    found = client.segment([[200, 150]], [1])
    np.testing.assert_array_equal(found.logits, logits)
    assert found.masks.dtype == np.bool_ and found.masks.shape == (1, 1, 300, 400)
    # 60 - 3 r > 0 inside a radius of 20 of 256, stretched to 400x300 around the point.
    x1, y1, x2, y2 = found.bbox[0, 0]
    np.testing.assert_allclose([x1, x2], 200 + np.array([-20, 20]) * 400 / side, atol=1.1)
    np.testing.assert_allclose([y1, y2], 150 + np.array([-20, 20]) * 300 / side, atol=1.1)
    np.testing.assert_allclose(found.area, np.pi * 400 * 400 * 300 / side**2, rtol=0.01)


def test_several_prompts_and_masks(client: SAM2TritonClient) -> None:
    client.set_image(photo())
    found = client.segment([[[50, 60]], [[300, 200]]], [[1], [1]], multimask_output=True)
    assert found.masks.shape == (2, 3, 300, 400)
    np.testing.assert_allclose(found.scores, [[0.5, 0.7, 0.9]] * 2, rtol=1e-6)
    best = found.best()
    assert best[0, 60, 50] and best[1, 200, 300] and not best[0, 200, 300]


def test_what_predict_returns_is_a_prompt(
    client: SAM2TritonClient, transport: FakeTransport, family: Family
) -> None:
    client.set_image(photo())
    points: dict[str, Any] = {"point_coords": [[[9, 9]], [[50, 50]]], "point_labels": [[1], [1]]}
    logits, _ = client.predict(**points)
    client.predict(**points, mask_input=logits)
    np.testing.assert_array_equal(transport.calls[-1].inputs[family.prompts.mask], logits)
    logits, _ = client.predict([[9, 9]], [1], multimask_output=True)
    client.predict([[9, 9]], [1], mask_input=logits[0, 2])
    np.testing.assert_array_equal(transport.calls[-1].inputs[family.prompts.mask], logits[:, 2:])


def test_an_older_deployment(
    client: SAM2TritonClient, transport: FakeTransport, family: Family
) -> None:
    needed = {tensor.name for tensor in family.decoder.inputs if not tensor.optional}
    encoder, decoder = family.models
    outputs = frozenset(t.name for t in encoder.outputs if t.name in needed)
    transport.models[encoder.name] = Served(transport.models[encoder.name].inputs, outputs)
    transport.models[decoder.name] = Served(
        frozenset(needed), transport.models[decoder.name].outputs
    )
    client.set_image(photo())
    client.predict(box=[1, 2, 3, 4])
    assert set(transport.calls[0].outputs) == outputs
    assert set(transport.calls[1].inputs) == needed
    with pytest.raises(PromptError, match="older one"):
        client.predict(box=[1, 2, 3, 4], multimask_output=True)


def test_no_image_yet(client: SAM2TritonClient) -> None:
    for use in (
        lambda: client.predict([[1, 2]], [1]),
        lambda: client.segment([[1, 2]], [1]),
        lambda: client.original_size,
    ):
        with pytest.raises(ImageNotSetError, match="call set_image first"):
            use()


def test_a_failed_image_leaves_the_old_one(
    client: SAM2TritonClient, transport: FakeTransport, family: Family
) -> None:
    client.set_image(np.full((30, 40, 3), 255, np.uint8))

    with pytest.raises(ImageError):
        client.set_image(b"no image")
    transport.answer = lambda call: {}
    with pytest.raises(InferenceError):
        client.set_image(photo())

    transport.answer = lambda call: answer(family, call)
    assert client.original_size == (30, 40)
    client.predict(box=[1, 1, 3, 3])
    assert (transport.calls[-1].inputs[family.encoder.outputs[0].name] == 1).all()


def test_wrong_prompts_reach_no_server(client: SAM2TritonClient, transport: FakeTransport) -> None:
    client.set_image(photo())
    calls = len(transport.calls)
    wrong: list[dict[str, Any]] = [{}, {"point_coords": [[1, 2]]}, {"box": [500, 1, 600, 2]}]
    for given in wrong:
        with pytest.raises(PromptError):
            client.predict(**given)
        with pytest.raises(PromptError):
            client.segment(**given)
    assert len(transport.calls) == calls


def test_original_size_is_that_of_the_upright_image(client: SAM2TritonClient) -> None:
    image = Image.fromarray(photo(40, 30))
    image.getexif()[0x0112] = 6
    client.set_image(image)
    assert client.original_size == (40, 30)


def test_the_limit_of_pixels_is_the_callers(transport: FakeTransport, family: Family) -> None:
    client = SAM2TritonClient(
        model_type=family.name, transport=transport, max_image_pixels=40 * 30 - 1
    )
    with client, pytest.raises(ImageError, match="max_image_pixels"):
        client.set_image(photo(40, 30))
    assert transport.calls == []


def test_closed(family: Family, transport: FakeTransport) -> None:
    client = SAM2TritonClient(model_type=family.name, transport=transport)
    client.set_image(photo())
    client.close()
    client.close()
    assert transport.closed == 1
    uses: list[Callable[[], Any]] = [
        lambda: client.set_image(photo()),
        lambda: client.predict([[1, 2]], [1]),
        lambda: client.segment([[1, 2]], [1]),
        lambda: client.original_size,
        client.is_ready,
        client.wait_until_ready,
    ]
    for use in uses:
        with pytest.raises(ClientClosedError, match="closed"):
            use()


def test_readiness(client: SAM2TritonClient, transport: FakeTransport) -> None:
    assert client.is_ready()
    transport.not_ready = [ServerUnavailableError("down"), ModelNotReadyError("loading")]
    assert not client.is_ready() and not client.is_ready() and client.is_ready()

    transport.not_ready = [ServerUnavailableError("down"), ModelNotReadyError("loading")]
    client.wait_until_ready(timeout_s=5)
    assert transport.not_ready == []

    transport.not_ready = [ModelNotReadyError("still loading") for _ in range(99)]
    started = time.monotonic()
    with pytest.raises(ServerTimeoutError, match=r"within 0\.5 s\. still loading"):
        client.wait_until_ready(timeout_s=0.5)
    assert time.monotonic() - started < 1


def test_unknown_model_type() -> None:
    with pytest.raises(InvalidInputError, match="'sam9'; choose one of: sam2"):
        SAM2TritonClient(model_type="sam9")


def test_the_url_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_URL", "localhost:1")
    with (
        SAM2TritonClient(timeout_s=5) as client,
        pytest.raises(ServerUnavailableError, match="localhost:1:"),
    ):
        client.set_image(photo())
    with (
        SAM2TritonClient("127.0.0.1:2", timeout_s=5) as client,
        pytest.raises(ServerUnavailableError, match=r"127\.0\.0\.1:2:"),
    ):
        client.set_image(photo())
    monkeypatch.setenv("TRITON_URL", "nonsense")
    with pytest.raises(InvalidInputError, match="'nonsense'"):
        SAM2TritonClient()
