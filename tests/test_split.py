"""The decoder in three graphs: what the predictor runs says what the pair's decoder says."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import SPEC, Exported
from fakes import photo
from test_repository import fake_model, install, problems

from triton_sam import repository
from triton_sam.errors import ExportError
from triton_sam.export import pipeline
from triton_sam.export.split import trace_split
from triton_sam.graphs import external_tensors, read_graph
from triton_sam.images import load_image, preprocess
from triton_sam.predictor.engine import Device, Engine
from triton_sam.predictor.store import Encoded
from triton_sam.prompts import Prompt
from triton_sam.protocol import Prediction, decode_calls, encode_call, read_prediction
from triton_sam.specs.split import split_decoder

SIZE = (90, 120)

PROMPTS: dict[str, dict[str, Any]] = {
    "click": {"point_coords": [[30, 40]], "point_labels": [1]},
    "clicks": {"point_coords": np.full((3, 5, 2), 33) + np.arange(5)[:, None], "points": 5},
    "box": {"box": [10, 10, 80, 70]},
    "box and clicks": {"box": [10, 10, 80, 70], "point_coords": [[30, 40]], "point_labels": [0]},
    "mask": {"mask": 1},
    "three masks": {"point_coords": np.full((3, 1, 2), 44), "points": 1, "mask": 3},
    "many clicks": {"point_coords": np.full((1, 60, 2), 50), "points": 60},
}


def prompt(name: str, multimask: bool, exported: Exported) -> Prompt:
    given = dict(PROMPTS[name])
    rng = np.random.default_rng(3)
    if count := given.pop("points", 0):
        shape = np.shape(given["point_coords"])
        given["point_coords"] = rng.uniform(0, 89, shape)
        given["point_labels"] = rng.integers(0, 2, (shape[0], count))
    if count := given.pop("mask", 0):
        side = exported.family.prompts.mask_size
        given["mask_input"] = rng.normal(0, 5, (count, 1, side, side)).astype(np.float32)
    layout = exported.family.prompts
    return Prompt.create(**given, multimask_output=multimask, original_size=SIZE, layout=layout)


def encode(engine: Engine) -> Encoded:
    pixels = preprocess(load_image(photo(*reversed(SIZE))), engine.family.image)
    tensors = engine.encode(encode_call(engine.family, pixels, engine.encoder_served))
    return Encoded(tensors, SIZE, 0)


def decode(engine: Engine, encoded: Encoded, asked: Prompt) -> Prediction:
    served = engine.decoder_served
    calls = decode_calls(engine.family, encoded, asked, served)
    return read_prediction(engine.family, [engine.decode(c) for c in calls], asked, served)


@pytest.fixture
def engines(each: Exported, tmp_path: Path) -> Iterator[tuple[Engine, Engine]]:
    """One that runs the graphs, and one for the same pair without them."""
    root = Path(shutil.copytree(each.repository, tmp_path / "models"))
    for graph in split_decoder(each.family).graphs:
        (root / graph.name / "1" / graph.file).unlink()
    made = [Engine(each.family, folder, Device(), 2) for folder in (each.repository, root)]
    yield made[0], made[1]
    for engine in made:
        engine.close()


def test_the_graphs_say_what_the_decoder_says(
    each: Exported, engines: tuple[Engine, Engine]
) -> None:
    ours, pair = engines
    assert "image_rows" in ours.decoder_served.inputs - pair.decoder_served.inputs
    kept, encoded = encode(ours), encode(pair)
    for engine, image in ((ours, kept), (pair, encoded)):
        shapes = {name: tuple(value.shape())[1:] for name, value in image.tensors.items()}
        # What the store reckons an image with.
        assert shapes == {tensor.name: tensor.dims[1:] for tensor in engine.kept}
    for name in PROMPTS:
        for multimask in (False, True):
            asked = prompt(name, multimask, each)
            own, expected = decode(ours, kept, asked), decode(pair, encoded, asked)
            largest = float(np.abs(expected.logits).max())
            assert np.abs(own.logits - expected.logits).max() <= 1e-5 * largest, name
            np.testing.assert_allclose(own.scores, expected.scores, atol=1e-5, err_msg=name)


def test_prompts_of_one_image_are_what_each_is_alone(
    each: Exported, engines: tuple[Engine, Engine]
) -> None:
    ours, _ = engines
    kept = encode(ours)
    for name in ("clicks", "three masks"):
        asked = prompt(name, False, each)
        together = decode(ours, kept, asked)
        for row in range(3):
            alone = decode(ours, kept, asked.rows(slice(row, row + 1)))
            largest = float(np.abs(alone.logits).max())
            assert np.abs(alone.logits[0] - together.logits[row]).max() <= 1e-5 * largest, name


def test_the_weights_are_the_decoders(each: Exported) -> None:
    decoder = each.file(each.family.decoder.name)
    held = decoder.read_bytes()
    for graph in split_decoder(each.family).graphs:
        path = decoder.with_name(graph.file)
        assert path.stat().st_size < 300_000
        shared = list(external_tensors(read_graph(path).graph))
        assert {one.location for one in shared} == {decoder.name}
        whole = {weight.name: weight for weight in onnx.load(str(path)).graph.initializer}
        for one in shared:
            assert held[one.offset : one.offset + one.length] == whole[one.tensor.name].raw_data


def test_the_exporter_held_them_against_the_official_predictor(each: Exported) -> None:
    compared = each.manifest(each.family.decoder.name)["predictor_parity"]
    kinds = {(one["image"], one["prompt"]) for one in compared}
    assert kinds == {(one.image, one.prompt) for one in each.differences}
    for one in compared:
        assert one["max_difference"] <= 1e-4 * one["max_logit"], one
    # Their sums have another order: the same figures would be the pair's decoder's.
    assert compared != each.manifest(each.family.decoder.name)["parity"]


def test_graphs_that_answer_otherwise_are_not_installed(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace_another(whole: torch.nn.Module, *rest: Any) -> list[Path]:
        other = copy.deepcopy(whole)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.01)
        return trace_split(other, *rest)

    monkeypatch.setattr(pipeline, "trace_split", trace_another)
    with pytest.raises(ExportError, match=r"differs .* nothing was installed"):
        pipeline.export(SPEC, "demo", exported.checkpoint, tmp_path / "repository")
    assert list((tmp_path / "repository").iterdir()) == []


def test_graphs_of_another_decoder_are_not_run(
    exported: Exported, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(shutil.copytree(exported.repository, tmp_path / "models"))
    decoder = root / "sam2_decoder" / "1" / "model.onnx"
    proto = onnx.load(str(decoder))
    proto.doc_string = "somebody's own"  # its weights now lie elsewhere in the file
    onnx.save(proto, str(decoder))
    asked = prompt("click", False, exported)
    answers = []
    for folder in (root, exported.repository):
        engine = Engine(SPEC, folder, Device(), 2)
        answers.append(decode(engine, encode(engine), asked))
        engine.close()
    (message,) = caplog.messages
    assert "sam2_decoder runs without click.onnx" in message
    assert "are not the files that were exported" in message
    largest = float(np.abs(answers[1].logits).max())
    assert np.abs(answers[0].logits - answers[1].logits).max() <= 1e-5 * largest


def test_check_sees_a_graph_that_is_missing_or_another(exported: Exported, tmp_path: Path) -> None:
    root = Path(shutil.copytree(exported.repository, tmp_path / "models"))
    folder = root / "sam2_decoder" / "1"
    (folder / "mask.onnx").unlink()
    fake_model(split_decoder(SPEC).mask, folder / "click.onnx")
    described = "is not the file that 1/export.json describes; export it again."
    tensors = [line for line in problems(root) if "the graph's" in line]
    others = [line for line in problems(root) if "the graph's" not in line]
    assert "sam2_decoder: 1/mask.onnx is missing; export the model again." in others
    assert f"sam2_decoder: 1/click.onnx {described}" in others
    assert [line.partition(" are [")[0] for line in tensors] == [
        "sam2_decoder: 1/click.onnx: the graph's inputs",
        "sam2_decoder: 1/click.onnx: the graph's outputs",
    ]


def test_a_pair_without_graphs_takes_those_of_the_last_one_away(
    exported: Exported, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(exported.repository, tmp_path / "models"))
    stamp = root / "sam2_predictor" / "1" / repository.PAIR_FILE
    before = json.loads(stamp.read_text())
    assert sorted(before) == [
        "sam2_decoder",
        *(f"sam2_decoder/{name}.onnx" for name in ("click", "mask", "prepare")),
        "sam2_encoder",
    ]
    install(root)
    left = sorted(path.name for path in (root / "sam2_decoder" / "1").iterdir())
    assert left == ["export.json", "model.onnx"]
    assert sorted(json.loads(stamp.read_text())) == ["sam2_decoder", "sam2_encoder"]
    assert problems(root) == []
