"""Calls and answers, over the family table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from triton_sam.embedding import EmbeddingKey
from triton_sam.errors import InferenceError, PromptError
from triton_sam.prompts import Prompt
from triton_sam.protocol import (
    Call,
    Embedding,
    Prediction,
    Served,
    decode_calls,
    encode_call,
    read_embedding,
    read_prediction,
)
from triton_sam.specs import FAMILIES, Family, Model

SIZE = (100, 200)


def f32(values: Any) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


@pytest.fixture(params=list(FAMILIES.values()), ids=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


def served(model: Model, *, without: tuple[str, ...] = ()) -> Served:
    return Served(
        frozenset(t.name for t in model.inputs).difference(without),
        frozenset(t.name for t in model.outputs).difference(without),
    )


def zeros(dims: tuple[int, ...]) -> NDArray[np.float32]:
    return np.zeros([abs(n) for n in dims], np.float32)


def features(family: Family) -> dict[str, NDArray[np.float32]]:
    return {tensor.name: zeros(tensor.dims) for tensor in family.encoder.outputs}


def embedding(family: Family) -> Embedding:
    return Embedding(features(family), SIZE, "digest", family.name)


def prompt(family: Family, **given: Any) -> Prompt:
    return Prompt.create(**given, original_size=SIZE, layout=family.prompts)


def decode(family: Family, without: tuple[str, ...] = (), **given: Any) -> Call:
    asked = prompt(family, **given)
    decoder = served(family.decoder, without=without)
    (call,) = decode_calls(family, embedding(family), asked, decoder)
    return call


def read(family: Family, arrays: Any, asked: Prompt) -> Prediction:
    return read_prediction(family, [arrays], asked, served(family.decoder))


def points_of(family: Family, call: Call) -> tuple[Any, Any]:
    """Points and labels of a call, without the axis of length one that some families have."""
    points, labels = call.inputs[family.prompts.points], call.inputs[family.prompts.labels]
    return (points[:, 0], labels[:, 0]) if family.prompts.group_axis else (points, labels)


def test_encode(family: Family) -> None:
    pixels = zeros(family.encoder.inputs[0].dims)
    call = encode_call(family, pixels, served(family.encoder))
    assert call.model == family.encoder.name
    assert list(call.inputs) == [family.encoder.inputs[0].name]
    assert call.inputs[family.encoder.inputs[0].name] is pixels
    assert call.outputs == tuple(tensor.name for tensor in family.encoder.outputs)


def test_embedding(family: Family) -> None:
    call = encode_call(family, zeros(family.encoder.inputs[0].dims), served(family.encoder))
    answer = features(family)
    read = read_embedding(family, call, answer, SIZE, EmbeddingKey("abc", family.name))
    assert (read.original_size, read.digest, read.family) == (SIZE, "abc", family.name)
    assert {k: id(v) for k, v in read.tensors.items()} == {k: id(v) for k, v in answer.items()}


def optional_features(family: Family) -> tuple[str, ...]:
    optional = {tensor.name for tensor in family.decoder.inputs if tensor.optional}
    return tuple(t.name for t in family.encoder.outputs if t.name in optional)


def test_an_older_encoder_is_asked_for_what_it_has(family: Family) -> None:
    missing = optional_features(family)
    call = encode_call(family, zeros((1, 3, 2, 2)), served(family.encoder, without=missing))
    assert set(call.outputs) == {t.name for t in family.encoder.outputs} - set(missing)


def test_an_encoder_of_another_contract(family: Family) -> None:
    name = next(t.name for t in family.encoder.outputs if t.name not in optional_features(family))
    with pytest.raises(InferenceError, match=f"{family.encoder.name}.*has no tensor '{name}'"):
        encode_call(family, zeros((1,)), served(family.encoder, without=(name,)))
    with pytest.raises(InferenceError, match="has no tensor"):
        encode_call(family, zeros((1,)), Served(frozenset(), frozenset()))


def test_clicks_travel_in_the_encoders_frame(family: Family) -> None:
    layout, side = family.prompts, family.image.size
    call = decode(
        family,
        point_coords=[[50, 25], [200, 100]],
        point_labels=[1, 0],
        multimask_output=always_three(family),
    )
    assert call.model == family.decoder.name
    assert call.outputs == (family.masks, family.scores)
    points, labels = points_of(family, call)
    # The image is twice as wide as high; padding leaves the lower half of the square.
    bottom = side / 2 if family.image.fit == "pad" else side
    np.testing.assert_array_equal(points, f32([[[side / 4, bottom / 4], [side, bottom]]]))
    np.testing.assert_array_equal(labels, f32([[1, 0]]))
    boxes = [] if layout.boxes is None else [layout.boxes]
    assert set(call.inputs) == {layout.points, layout.labels, *boxes, *features(family)}
    for name, array in call.inputs.items():
        assert array.dtype == family.decoder.input(name).dtype


def test_boxes_and_clicks(family: Family) -> None:
    layout = family.prompts
    call = decode(
        family,
        box=[[0, 0, 100, 50], [50, 25, 200, 100]],
        point_coords=[[[50, 50]], [[0, 0]]],
        point_labels=[[0], [-1]],
    )
    bottom = 0.5 if family.image.fit == "pad" else 1
    scale = f32([family.image.size, family.image.size * bottom])
    corners = f32([[[0, 0], [0.5, 0.5]], [[0.25, 0.25], [1, 1]]]) * scale
    clicks = f32([[[0.25, 0.5]], [[0, 0]]]) * scale
    points, labels = points_of(family, call)
    if layout.boxes is None:
        # Corners stand before clicks.
        np.testing.assert_array_equal(points, np.concatenate([corners, clicks], 1))
        expected = [[*layout.box_labels, 0], [*layout.box_labels, layout.pad_label]]
        np.testing.assert_array_equal(labels, expected)
    else:
        np.testing.assert_array_equal(call.inputs[layout.boxes], corners.reshape(2, 1, 4))
        np.testing.assert_array_equal(points, clicks)
        np.testing.assert_array_equal(labels, [[0], [layout.pad_label]])


def test_a_box_that_is_not_there_has_length_zero(family: Family) -> None:
    call = decode(family, point_coords=[[1, 2]], point_labels=[1])
    if family.prompts.boxes is not None:
        assert call.inputs[family.prompts.boxes].shape == (1, 0, 4)


def test_a_mask_alone_comes_with_no_points(family: Family) -> None:
    layout = family.prompts
    mask = np.random.default_rng(0).normal(size=(3, 1, layout.mask_size, layout.mask_size))
    call = decode(family, mask_input=mask)
    np.testing.assert_array_equal(call.inputs[layout.mask], mask.astype(np.float32))
    np.testing.assert_array_equal(call.inputs[layout.has_mask], f32([1, 1, 1]))
    points, labels = points_of(family, call)
    assert points.shape == (3, 0, 2)
    assert labels.shape == (3, 0)


def test_multimask_travels_only_when_it_is_not_the_default(family: Family) -> None:
    name = family.prompts.multimask
    default = family.decoder.input(name).default
    assert default is not None
    for wanted in (False, True):
        call = decode(family, box=[1, 2, 3, 4], multimask_output=wanted)
        if wanted == bool(default[1]):
            assert name not in call.inputs
        else:
            np.testing.assert_array_equal(call.inputs[name], f32([wanted]))


def test_what_is_sent_fits_the_declared_inputs(family: Family) -> None:
    side = family.prompts.mask_size
    call = decode(
        family,
        point_coords=np.zeros((2, 3, 2)),
        point_labels=np.ones((2, 3)),
        box=[[1, 2, 3, 4]] * 2,
        mask_input=np.zeros((2, 1, side, side)),
        multimask_output=family.name != "sam3",
    )
    assert set(call.inputs) == {tensor.name for tensor in family.decoder.inputs}
    for name, array in call.inputs.items():
        tensor = family.decoder.input(name)
        assert array.dtype == tensor.dtype
        assert len(array.shape) == len(tensor.dims)
        assert all(want in (-1, n) for n, want in zip(array.shape, tensor.dims, strict=True))


def test_an_older_decoder_is_not_sent_what_it_does_not_take(family: Family) -> None:
    unknown = tuple(tensor.name for tensor in family.decoder.inputs if tensor.optional)
    call = decode(family, without=unknown, box=[1, 2, 3, 4])
    assert set(call.inputs) == {t.name for t in family.decoder.inputs if not t.optional}


def test_an_older_decoder_cannot_do_what_it_does_not_take(family: Family) -> None:
    layout = family.prompts
    mask = np.zeros((layout.mask_size, layout.mask_size), np.float32)
    with pytest.raises(PromptError, match=f"takes no '{layout.mask}'"):
        decode(family, without=(layout.mask, layout.has_mask), mask_input=mask)
    if not always_three(family):
        with pytest.raises(PromptError, match=f"takes no '{layout.multimask}'"):
            decode(family, without=(layout.multimask,), box=[1, 2, 3, 4], multimask_output=True)


def always_three(family: Family) -> bool:
    return family.decoder.output(family.scores).dims[-1] == 3


def test_a_decoder_that_others_exported_gets_one_prompt_a_call() -> None:
    sam3 = FAMILIES["sam3"]
    ours = tuple(tensor.name for tensor in sam3.decoder.inputs if tensor.ours)
    decoder = served(sam3.decoder, without=ours)
    asked = prompt(
        sam3, point_coords=[[[50, 50]], [[20, 10]]], point_labels=[[1], [0]], box=[[1, 2, 3, 4]] * 2
    )
    calls = decode_calls(sam3, embedding(sam3), asked, decoder)
    assert [points_of(sam3, call)[1].tolist() for call in calls] == [[[1]], [[0]]]
    assert all(set(call.inputs).isdisjoint(ours) for call in calls)

    # It always says three masks: the best is the one.
    answers = [answer(sam3, masks=3) for _ in calls]
    answers[1][sam3.scores][0, 0] = [0.1, 0.3, 0.2]
    answers[1][sam3.masks][0, 0, 1] = -7
    read = read_prediction(sam3, answers, asked, decoder)
    assert read.scores.tolist() == [[0.5], [f32(0.3)]]
    assert read.logits.shape == (2, 1, 288, 288)
    assert (read.logits[1] == -7).all()


def test_three_answers_to_one_question_begin_with_it() -> None:
    sam3 = FAMILIES["sam3"]
    arrays = answer(sam3, masks=3)
    arrays[sam3.scores][0, 0] = [0.1, 0.3, 0.2]
    asked = prompt(sam3, box=[1, 2, 3, 4])
    assert read(sam3, arrays, asked).scores.tolist() == [[f32(0.1)]]


def test_a_decoder_of_another_contract(family: Family) -> None:
    needed = [tensor.name for tensor in family.decoder.inputs if not tensor.optional]
    for name in (*needed, family.masks, family.scores):
        with pytest.raises(InferenceError, match=f"has no tensor '{name}'"):
            decode(family, without=(name,), box=[1, 2, 3, 4])


def answer(family: Family, prompts: int = 1, masks: int = 1) -> dict[str, NDArray[np.float32]]:
    side = family.prompts.mask_size
    masks = 3 if always_three(family) else masks
    group = (1,) if family.prompts.group_axis else ()
    return {
        family.masks: np.full((prompts, *group, masks, side, side), 50, np.float32),
        family.scores: np.full((prompts, *group, masks), 0.5, np.float32),
    }


def test_prediction_is_not_clamped(family: Family) -> None:
    found = read(family, answer(family), prompt(family, box=[1, 2, 3, 4]))
    assert found.logits.max() == 50 and found.scores.tolist() == [[0.5]]


def test_answers_of_another_contract(family: Family) -> None:
    asked = prompt(family, box=[1, 2, 3, 4])
    good = answer(family)
    bad: list[tuple[dict[str, Any], str]] = [
        ({family.scores: good[family.scores]}, f"returned nothing as '{family.masks}'"),
        ({**good, family.masks: good[family.masks].astype(np.float16)}, "returned float16"),
        ({**good, family.masks: good[family.masks][0]}, "expected float32"),
        ({**good, family.scores: np.repeat(good[family.scores], 2, 0)}, "scores of shape"),
        (answer(family, prompts=2), "answered 1 prompts with"),
    ]
    for arrays, message in bad:
        with pytest.raises(InferenceError, match=message):
            read(family, arrays, asked)


def test_an_embedding_that_is_none(family: Family) -> None:
    call = encode_call(family, zeros(family.encoder.inputs[0].dims), served(family.encoder))
    with pytest.raises(InferenceError, match="returned nothing"):
        read_embedding(family, call, {}, SIZE, EmbeddingKey("", family.name))
