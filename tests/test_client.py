"""The sync and the async client over a transport that is a function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from faces import FACES, AsyncFace, Blocking
from fakes import FakeTransport, answer, f32, mean, photo
from PIL import Image

from triton_sam import (
    AsyncSAM2TritonClient,
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


@pytest.fixture(params=list(FAMILIES.values()), ids=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


@pytest.fixture
def transport(family: Family) -> FakeTransport:
    return FakeTransport(family, lambda call: answer(family, call))


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_client(
    face: str, transport: FakeTransport | None = None, *args: Any, **kwargs: Any
) -> Any:
    """A client of either kind, with the methods of the sync one."""
    if face == "sync":
        return SAM2TritonClient(*args, transport=transport, **kwargs)
    other = None if transport is None else AsyncFace(transport)
    return Blocking(lambda: AsyncSAM2TritonClient(*args, transport=other, **kwargs))


@pytest.fixture
def client(face: str, family: Family, transport: FakeTransport) -> Iterator[SAM2TritonClient]:
    with open_client(face, transport, model_type=family.name) as client:
        yield client


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
        image = np.full((4, 5, 3), value, np.uint8)
        client.set_image(image)
        client.predict(box=[1, 1, 3, 3])
        expected = f32(mean(image, family))
        for tensor in family.encoder.outputs:
            assert (transport.calls[-1].inputs[tensor.name] == expected).all()


def test_predict_clamps_and_segment_does_not(client: SAM2TritonClient, family: Family) -> None:
    client.set_image(photo())
    logits, scores = client.predict([[200, 150]], [1])
    side, clip = family.prompts.mask_size, family.prompts.mask_clip
    assert logits.dtype == np.float32 and logits.shape == (1, 1, side, side)
    assert scores.dtype == np.float32 and scores.tolist() == [[0.5]]
    # The disc is 60 high; the corner of the frame lies below -32.
    assert logits.max() == (clip or pytest.approx(60, abs=3))
    assert logits.min() == -clip if clip else logits.min() < -100

    found = client.segment([[200, 150]], [1])
    np.testing.assert_array_equal(found.logits, logits)
    assert found.masks.dtype == np.bool_ and found.masks.shape == (1, 1, 300, 400)
    # 60 - 3 r > 0 inside a radius of 20 of the side, stretched to the image around the point.
    height = 300 if family.image.fit == "stretch" else 400
    x1, y1, x2, y2 = found.bbox[0, 0]
    np.testing.assert_allclose([x1, x2], 200 + np.array([-20, 20]) * 400 / side, atol=1.1)
    np.testing.assert_allclose([y1, y2], 150 + np.array([-20, 20]) * height / side, atol=1.1)
    np.testing.assert_allclose(found.area, np.pi * 400 * 400 * height / side**2, rtol=0.01)


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
    side = family.prompts.mask_size
    with pytest.raises(PromptError, match="takes no"):
        client.predict(box=[1, 2, 3, 4], mask_input=np.zeros((side, side)))


def test_a_variant_is_asked_by_its_own_name(face: str, family: Family) -> None:
    name = list(family.variants)[-1]
    named = family.named(name)
    transport = FakeTransport(named, lambda call: answer(named, call))
    with open_client(face, transport, model_type=family.name, variant=name) as client:
        client.set_image(photo())
        client.predict([[10, 20]], [1])
        assert client.embedding.variant == ("" if named is family else name)
    assert [call.model for call in transport.calls] == [m.name for m in named.models]


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
    white = np.full((30, 40, 3), 255, np.uint8)
    client.set_image(white)

    with pytest.raises(ImageError):
        client.set_image(b"no image")
    transport.answer = lambda call: {}
    with pytest.raises(InferenceError):
        client.set_image(photo())

    transport.answer = lambda call: answer(family, call)
    assert client.original_size == (30, 40)
    client.predict(box=[1, 1, 3, 3])
    sent = transport.calls[-1].inputs[family.encoder.outputs[0].name]
    assert (sent == f32(mean(white, family))).all()


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


def test_the_limit_of_pixels_is_the_callers(
    face: str, transport: FakeTransport, family: Family
) -> None:
    limit = 40 * 30 - 1
    client = open_client(face, transport, model_type=family.name, max_image_pixels=limit)
    with client, pytest.raises(ImageError, match="max_image_pixels"):
        client.set_image(photo(40, 30))
    assert transport.calls == []


def test_closed(client: SAM2TritonClient, transport: FakeTransport) -> None:
    client.set_image(photo())
    embedding = client.embedding
    client.close()
    client.close()
    assert transport.closed == 1
    uses: list[Callable[[], Any]] = [
        lambda: client.set_image(photo()),
        lambda: client.predict([[1, 2]], [1]),
        lambda: client.segment([[1, 2]], [1]),
        lambda: client.predict([[1, 2]], [1], embedding=embedding),
        lambda: client.encode(photo()),
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
    assert time.monotonic() - started < 5


def test_an_embedding_can_be_kept(
    client: SAM2TritonClient, transport: FakeTransport, family: Family
) -> None:
    white = np.full((30, 40, 3), 255, np.uint8)
    client.set_image(white)
    dark = np.full((300, 200, 3), 10, np.uint8)
    other = client.encode(dark)
    assert (other.original_size, other.family) == ((300, 200), family.name)
    assert client.original_size == (30, 40)

    feature = family.encoder.outputs[0].name
    found = client.segment([[150, 250]], [1], embedding=other)
    assert found.masks.shape == (1, 1, 300, 200)
    assert (transport.calls[-1].inputs[feature] == f32(mean(dark, family))).all()
    client.predict([[39, 29]], [1])
    assert (transport.calls[-1].inputs[feature] == f32(mean(white, family))).all()
    logits, _ = client.predict([[150, 250]], [1], embedding=other)
    np.testing.assert_array_equal(logits, found.logits)
    with pytest.raises(PromptError, match="outside the image of 40x30"):
        client.predict([[150, 250]], [1])


def test_an_embedding_of_another_client(
    face: str, client: SAM2TritonClient, transport: FakeTransport, family: Family
) -> None:
    client.set_image(photo())
    with open_client(face, transport, model_type=family.name) as other:
        assert other.predict([[1, 2]], [1], embedding=client.embedding)[1].tolist() == [[0.5]]
        with pytest.raises(ImageNotSetError):
            other.predict([[1, 2]], [1])


def test_what_is_no_embedding_of_this_family(
    client: SAM2TritonClient, transport: FakeTransport
) -> None:
    client.set_image(photo())
    for wrong, message in (
        (replace(client.embedding, family="sam9"), "'sam9', variant None"),
        (replace(client.embedding, variant="other"), "variant 'other'"),
        (photo(), r"come from encode\(\); got 'ndarray'"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            client.predict([[1, 2]], [1], embedding=wrong)  # type: ignore[arg-type]
    assert len(transport.calls) == 1


def test_the_timeout_of_a_call(client: SAM2TritonClient, transport: FakeTransport) -> None:
    client.set_image(photo(), timeout_s=9)
    client.predict([[1, 2]], [1], timeout_s=5)
    client.segment([[1, 2]], [1])
    first, second, third = transport.timeouts
    assert first is not None and 5 < first < 9
    assert second is not None and 4 < second < 5
    assert third is None
    for wrong in (0, -1, float("nan")):
        with pytest.raises(InvalidInputError, match="positive number of seconds"):
            client.predict([[1, 2]], [1], timeout_s=wrong)


def test_what_is_served_is_asked_again_after_an_error(
    client: SAM2TritonClient, transport: FakeTransport, family: Family
) -> None:
    client.set_image(photo())
    client.predict([[1, 2]], [1])
    right = transport.answer

    def down(call: Call) -> Arrays:
        raise ServerUnavailableError("restarting")

    transport.answer = down
    with pytest.raises(ServerUnavailableError):
        client.predict([[1, 2]], [1])
    transport.answer = right
    client.predict([[1, 2]], [1])
    decoder = family.decoder.name
    assert transport.asked == [family.encoder.name, decoder, decoder]


def test_unknown_model_type(face: str) -> None:
    with pytest.raises(InvalidInputError, match="'sam9'; choose one of: sam1, sam2, sam3"):
        open_client(face, model_type="sam9")


def test_the_url_comes_from_the_environment(face: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_URL", "localhost:1")
    with (
        open_client(face, timeout_s=5) as client,
        pytest.raises(ServerUnavailableError, match="localhost:1:"),
    ):
        client.set_image(photo())
    with (
        open_client(face, None, "127.0.0.1:2", timeout_s=5) as client,
        pytest.raises(ServerUnavailableError, match=r"127\.0\.0\.1:2:"),
    ):
        client.set_image(photo())
    monkeypatch.setenv("TRITON_URL", "nonsense")
    with pytest.raises(InvalidInputError, match="'nonsense'"):
        open_client(face)
