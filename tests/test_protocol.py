"""Calls and answers, over the family table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from triton_sam.errors import InferenceError, PromptError
from triton_sam.prompts import Prompt
from triton_sam.protocol import (
    Call,
    Embedding,
    Served,
    decode_call,
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
    return decode_call(family, embedding(family), asked, served(family.decoder, without=without))


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
    read = read_embedding(family, call, answer, SIZE, "abc")
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
    call = decode(family, point_coords=[[50, 25], [200, 100]], point_labels=[1, 0])
    assert call.model == family.decoder.name
    assert call.outputs == (family.masks, family.scores)
    np.testing.assert_array_equal(
        call.inputs[layout.points], f32([[[side / 4, side / 4], [side, side]]])
    )
    np.testing.assert_array_equal(call.inputs[layout.labels], f32([[1, 0]]))
    assert set(call.inputs) == {layout.points, layout.labels, *features(family)}
    assert all(array.dtype == np.float32 for array in call.inputs.values())


def test_corners_of_boxes_stand_before_clicks(family: Family) -> None:
    layout, side = family.prompts, family.image.size
    call = decode(
        family,
        box=[[0, 0, 100, 50], [50, 25, 200, 100]],
        point_coords=[[[50, 50]], [[0, 0]]],
        point_labels=[[0], [-1]],
    )
    expected = f32([[[0, 0], [0.5, 0.5], [0.25, 0.5]], [[0.25, 0.25], [1, 1], [0, 0]]])
    np.testing.assert_array_equal(call.inputs[layout.points], expected * f32(side))
    np.testing.assert_array_equal(
        call.inputs[layout.labels],
        f32([[*layout.box_labels, 0], [*layout.box_labels, layout.pad_label]]),
    )


def test_a_mask_alone_comes_with_no_points(family: Family) -> None:
    layout = family.prompts
    mask = np.random.default_rng(0).normal(size=(3, 1, layout.mask_size, layout.mask_size))
    call = decode(family, mask_input=mask)
    np.testing.assert_array_equal(call.inputs[layout.mask], mask.astype(np.float32))
    np.testing.assert_array_equal(call.inputs[layout.has_mask], f32([1, 1, 1]))
    assert call.inputs[layout.points].shape == (3, 0, 2)
    assert call.inputs[layout.labels].shape == (3, 0)


def test_multimask_travels_only_when_asked_for(family: Family) -> None:
    call = decode(family, box=[1, 2, 3, 4], multimask_output=True)
    np.testing.assert_array_equal(call.inputs[family.prompts.multimask], f32([1]))


def test_what_is_sent_fits_the_declared_inputs(family: Family) -> None:
    side = family.prompts.mask_size
    call = decode(
        family,
        point_coords=np.zeros((2, 3, 2)),
        point_labels=np.ones((2, 3)),
        box=[[1, 2, 3, 4]] * 2,
        mask_input=np.zeros((2, 1, side, side)),
        multimask_output=True,
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
    with pytest.raises(PromptError, match=f"takes no '{layout.multimask}'"):
        decode(family, without=(layout.multimask,), box=[1, 2, 3, 4], multimask_output=True)


def test_a_decoder_of_another_contract(family: Family) -> None:
    needed = [tensor.name for tensor in family.decoder.inputs if not tensor.optional]
    for name in (*needed, family.masks, family.scores):
        with pytest.raises(InferenceError, match=f"has no tensor '{name}'"):
            decode(family, without=(name,), box=[1, 2, 3, 4])


def answer(family: Family, prompts: int = 1, masks: int = 1) -> dict[str, NDArray[np.float32]]:
    side = family.prompts.mask_size
    return {
        family.masks: np.full((prompts, masks, side, side), 50, np.float32),
        family.scores: np.full((prompts, masks), 0.5, np.float32),
    }


def test_prediction_is_not_clamped(family: Family) -> None:
    read = read_prediction(family, answer(family), prompt(family, box=[1, 2, 3, 4]))
    assert read.logits.max() == 50 and read.scores.tolist() == [[0.5]]


def test_answers_of_another_contract(family: Family) -> None:
    asked = prompt(family, box=[1, 2, 3, 4])
    good = answer(family)
    bad: list[tuple[dict[str, Any], str]] = [
        ({family.scores: good[family.scores]}, f"returned nothing as '{family.masks}'"),
        ({**good, family.masks: good[family.masks].astype(np.float16)}, "returned float16"),
        ({**good, family.masks: good[family.masks][0]}, r"shape \(1, 256, 256\).*expected float32"),
        ({**good, family.scores: np.zeros((1, 2), np.float32)}, "scores of shape"),
        (answer(family, prompts=2), "answered 1 prompts with"),
    ]
    for arrays, message in bad:
        with pytest.raises(InferenceError, match=message):
            read_prediction(family, arrays, asked)


def test_an_embedding_that_is_none(family: Family) -> None:
    call = encode_call(family, zeros(family.encoder.inputs[0].dims), served(family.encoder))
    with pytest.raises(InferenceError, match="returned nothing"):
        read_embedding(family, call, {}, SIZE, "")
