"""Masks by name: kept within a budget, named alike by client and server, healed when forgotten."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import f32, photo
from predictors import FakeEngine, PredictorTransport, ask
from test_predictor_service import CLICK, LOOK, both, point, running, text

from triton_sam import SAM2TritonClient
from triton_sam.predictor.masks import MOST_MASKS, Masks, mask_name
from triton_sam.predictor.messages import PredictorError
from triton_sam.predictor.service import Predictor
from triton_sam.specs import FAMILIES, Family

__all__ = ["both"]  # a fixture
NAMED = (*CLICK, "mask_found", "mask_ids")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return f32(np.random.default_rng(seed).normal(0, 20, shape))


def test_a_name_follows_from_the_values_and_the_image() -> None:
    mask = f32(np.arange(4)).reshape(1, 2, 2)
    names = [
        mask_name("a", mask),
        mask_name("b", mask),
        mask_name("a", mask + 1),
        mask_name("a", -mask),
    ]
    assert len(set(names)) == 4
    # Clients work these out too, so they must never change.
    assert names[0] == "3868e3dd36136a8c0202947b27c746ac"
    assert mask_name("a", np.asfortranarray(mask)) == names[0] == mask_name("a", mask[0])


def test_the_least_recently_used_leave_first() -> None:
    kept = Masks(max_bytes=3 * 16)
    first = kept.keep("a", noise(1, 3, 2, 2))
    assert kept.find([first[0, 0].decode()]) is not None
    second = kept.keep("a", noise(1, 1, 2, 2, seed=1))
    gone = [kept.find([name.decode()]) is None for name in (*first[0], *second[0])]
    assert gone == [False, True, False, False]
    stats = kept.stats()
    assert (stats.nbytes, stats.hits, stats.misses) == (48, 4, 1)


def test_the_same_mask_counts_once_and_does_not_change_with_the_answer() -> None:
    kept, answer = Masks(max_bytes=1000), noise(1, 1, 2, 2)
    names = [kept.keep("a", answer)[0, 0].decode() for _ in range(2)]
    before = answer.copy()
    answer[:] = 0
    found = kept.find(names)
    assert names[0] == names[1] and kept.stats().nbytes == 16
    np.testing.assert_array_equal(found, np.concatenate([before, before]))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_mask_that_comes_back_is_named(family: Family) -> None:
    with running(family) as (predictor, engine):
        way = PredictorTransport(predictor)
        with SAM2TritonClient(transport=way, model_type=family.name) as client:
            client.set_image(photo())
            masks, _ = client.predict([[200, 100]], [1], multimask_output=True)
            client.predict([[30, 40]], [1], mask_input=masks[:, 1:2].astype(np.float64))
            sent = way.calls[-1].inputs
            assert sorted(sent) == ["image_handle", "mask_id", "point_coords", "point_labels"]
            np.testing.assert_array_equal(
                engine.decoded[-1].inputs[family.prompts.mask], masks[:, 1:2]
            )
            changed = masks[:, 1:2] + f32(1)
            client.predict([[30, 40]], [1], mask_input=changed)
            assert "mask_input" in way.calls[-1].inputs
            np.testing.assert_array_equal(engine.decoded[-1].inputs[family.prompts.mask], changed)
    assert masks.max() == (32 if family.prompts.mask_clip else masks.max())


def test_a_mask_for_each_of_several_prompts_is_named(
    both: tuple[Predictor, FakeEngine],
) -> None:
    predictor, engine = both
    way = PredictorTransport(predictor)
    coords, labels = [[[50, 60]], [[200, 100]]], [[1], [1]]
    with SAM2TritonClient(transport=way) as client:
        client.set_image(photo())
        masks, _ = client.predict(coords, labels)
        client.predict(coords, labels, mask_input=masks)
        assert len(way.calls[-1].inputs["mask_id"]) == 2
        given = [call.inputs["mask_input"] for call in engine.decoded[-2:]]
        np.testing.assert_array_equal(np.concatenate(given), masks)
        client.set_image(photo(seed=1))
        client.predict(coords, labels, mask_input=masks)
        assert "mask_input" in way.calls[-1].inputs  # it is a mask of another image


def test_a_forgotten_mask_is_sent_once_and_then_not_named_again() -> None:
    with running(mask_bytes=1) as (predictor, engine):
        way = PredictorTransport(predictor)
        with SAM2TritonClient(transport=way) as client:
            client.set_image(photo())
            masks, _ = client.predict([[200, 100]], [1])
            way.calls.clear()
            for _ in range(2):
                client.predict([[30, 40]], [1], mask_input=masks)
            named = ["mask_id" in call.inputs for call in way.calls]
        np.testing.assert_array_equal(engine.decoded[-1].inputs["mask_input"], masks)
    assert named == [True, False, False] and len(engine.decoded) == 3


def test_with_the_image_its_masks_are_sent_again() -> None:
    with running() as (first, _), running() as (second, engine):
        way = PredictorTransport(first)
        with SAM2TritonClient(transport=way) as client:
            client.set_image(photo())
            masks, _ = client.predict([[200, 100]], [1])
            way.service = second  # the server was restarted
            client.predict([[30, 40]], [1], mask_input=masks)
            names = [sorted(call.inputs)[:2] for call in way.calls[-2:]]
    assert names == [["image_handle", "mask_id"], ["image", "mask_input"]]
    np.testing.assert_array_equal(engine.decoded[-1].inputs["mask_input"], masks)


def test_more_masks_than_are_kept_are_not_named(both: tuple[Predictor, FakeEngine]) -> None:
    way, count = PredictorTransport(both[0]), MOST_MASKS + 1
    coords = np.random.default_rng(0).uniform(0, 300, (count, 1, 2))
    with SAM2TritonClient(transport=way) as client:
        client.set_image(photo())
        masks, _ = client.predict(coords, np.ones((count, 1)))
        client.predict(coords[0], [1], mask_input=masks[:1])
    assert "mask_input" in way.calls[-1].inputs
    assert both[0].counts()["mask_bytes"] <= 4 * 256 * 256


def test_who_asks_is_told_the_names(both: tuple[Predictor, FakeEngine]) -> None:
    predictor, engine = both
    asked = {"multimask_output": np.ones(1, bool), **point(200, 100)}
    answer = ask(predictor, (*LOOK, *NAMED), image=photo(), **asked).result(10)
    handle = bytes(answer["handle"][0]).decode()
    masks = np.clip(answer["low_res_logits"], -32, 32)
    expected = [mask_name(handle, mask).encode() for mask in masks[0]]
    assert answer["mask_ids"].tolist() == [expected] and answer["mask_found"].tolist() == [True]
    mask_id = answer["mask_ids"][0, 2:]
    again = {"image_handle": text(handle.encode()), "mask_id": mask_id, **point(30, 40)}
    assert ask(predictor, NAMED, **again).result(10)["mask_found"][0]
    np.testing.assert_array_equal(engine.decoded[-1].inputs["mask_input"], masks[:, 2:])
    counts = predictor.counts()
    assert (counts["mask_hits"], counts["mask_misses"]) == (1, 0)
    assert counts["mask_bytes"] == 2 * 4 * 256 * 256  # the three of one point are equal


@pytest.mark.parametrize("mask_id", [b"0" * 32, b"", b"short", b"\xff\xfe", b"x" * 100_000])
def test_an_unknown_name_is_an_answer_to_who_asks_for_it(
    mask_id: bytes, both: tuple[Predictor, FakeEngine]
) -> None:
    predictor, engine = both
    inputs = {"image": photo(), "mask_id": text(mask_id), **point(1, 2)}
    answer = ask(predictor, (*NAMED, "masks_rle"), **inputs).result(10)
    assert answer["found"][0] and not answer["mask_found"][0]
    assert answer["low_res_logits"].shape == (0, 0, 256, 256)
    assert answer["mask_ids"].shape == answer["masks_rle"].shape == (0, 0)
    with pytest.raises(PredictorError, match="send mask_input") as raised:
        ask(predictor, CLICK, **inputs).result(10)
    assert raised.value.kind == "unknown" and not engine.decoded
    unknown = {"image_handle": text(b"nothing"), "mask_id": text(mask_id)}
    answer = ask(predictor, NAMED, **unknown).result(10)
    assert not answer["found"][0] and not answer["mask_found"][0]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"mask_input": f32(np.zeros((1, 1, 256, 256)))}, "mask_input or mask_id, not both"),
        ({"mask_id": np.zeros(0, object)}, "mask_id is empty"),
        ({"mask_id": np.array([b"x"] * 2000, object)}, "has 2000 prompts"),
    ],
)
def test_names_that_cannot_be_used_are_refused(
    inputs: dict[str, Any], message: str, both: tuple[Predictor, FakeEngine]
) -> None:
    given = {"image": photo(), "mask_id": text(b"x"), **point(1, 2), **inputs}
    with pytest.raises(PredictorError, match=message) as raised:
        ask(both[0], NAMED, **given).result(10)
    assert raised.value.kind == "invalid"


def test_as_many_names_as_prompts_are_needed(both: tuple[Predictor, FakeEngine]) -> None:
    answer = ask(both[0], (*LOOK, *NAMED), image=photo(), **point(200, 100)).result(10)
    three = np.repeat(answer["mask_ids"][0], 3)
    with pytest.raises(PredictorError, match="numbers of prompts differ"):
        two = {"point_coords": f32(np.ones((2, 1, 2))), "point_labels": f32(np.ones((2, 1)))}
        ask(both[0], NAMED, image=photo(), mask_id=three, **two).result(10)
    points = {"point_coords": f32(np.ones((3, 1, 2))), "point_labels": f32(np.ones((3, 1)))}
    for names in (three, three[:1]):
        found = ask(both[0], NAMED, image=photo(), mask_id=names, **points).result(10)
        assert found["iou_predictions"].shape == (3, 1)
