"""Half precision: half the size, the same contract, and masks that are right or no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import SPEC, Exported
from onnx import TensorProto

from triton_sam import SAM2TritonClient, repository
from triton_sam.demo import demo_photo
from triton_sam.errors import ExportError
from triton_sam.export import precision
from triton_sam.export.parity import Difference
from triton_sam.export.pipeline import export
from triton_sam.export.precision import RECIPES, Recipe, convert, halve
from triton_sam.server import EmbeddedServer
from triton_sam.specs import Model

GOOD = Difference("photo", "box", 10.0, 0.02, 0.001, 0.9997, 0.4)
BAD = replace(GOOD, prompt="one click", mask_iou=0.42)


@pytest.mark.parametrize(
    "name",
    [
        "sam2",
        pytest.param("sam1", marks=pytest.mark.slow),
        pytest.param("sam3", marks=pytest.mark.slow),
    ],
)
def test_a_half_precision_pair_is_served(
    name: str, small: Callable[[str], Exported], tmp_path: Path
) -> None:
    each = small(name)
    family = each.family
    differences = export(
        *(family, each.variant, each.checkpoint, tmp_path),
        model_cfg=each.model_cfg,
        default=True,
        precision="fp16",
    )
    assert all(difference.mask_iou >= 0.99 for difference in differences)
    assert {difference.image for difference in differences} == {"photo", "second photo"}
    assert repository.check(tmp_path, [family]) == []
    for model in family.models:
        file = tmp_path / model.name / "1" / model.file
        # Weights are halved; the names of weights and nodes, and positions, are not.
        assert file.stat().st_size < 0.6 * each.file(model.name).stat().st_size
        manifest = json.loads((file.parent / "export.json").read_text())
        assert manifest["precision"] == "fp16"
        # The first recipe that passes; the demo model's worst mask is at the bound with the first.
        keeps = [recipe.keeps for recipe in RECIPES]
        assert list(manifest["failed"]) == keeps[: keeps.index(manifest["kept_in_float32"])]
    masks = []
    for root in (tmp_path, each.repository):
        with EmbeddedServer(root) as server, SAM2TritonClient(server.url, family.name) as client:
            client.set_image(demo_photo())
            masks.append(client.segment([[300, 168]], [1]).masks)
    assert (masks[0] & masks[1]).sum() >= 0.99 * (masks[0] | masks[1]).sum()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.keeps)
def test_every_recipe_keeps_the_contract(
    exported: Exported, recipe: Recipe, tmp_path: Path
) -> None:
    for model in SPEC.models:
        proto = onnx.load(str(convert(exported.file(model.name), model, recipe, tmp_path)))
        onnx.checker.check_model(proto, full_check=True)
        original = onnx.load(str(exported.file(model.name))).graph
        assert list(proto.graph.input) == list(original.input)
        assert [value.name for value in proto.graph.output] == [t.name for t in model.outputs]
        assert list(proto.graph.output) == list(original.output)
        types = {value.type.tensor_type.elem_type for value in proto.graph.output}
        assert types == {TensorProto.FLOAT}
        assert _defaults(proto, model) == {
            tensor.name: (TensorProto.FLOAT, *tensor.default)
            for tensor in model.inputs
            if tensor.default is not None
        }


def _defaults(proto: onnx.ModelProto, model: Model) -> dict[str, Any]:
    names = {tensor.name for tensor in model.inputs}
    found = {}
    for initializer in proto.graph.initializer:
        if initializer.name in names:
            array = onnx.numpy_helper.to_array(initializer)
            found[initializer.name] = (initializer.data_type, array.shape, float(array.max()))
            assert (array == array.max()).all()
    return found


def test_positions_stay_exact(exported: Exported, tmp_path: Path) -> None:
    """Halves of a pixel at 1000 pixels are lost in float16; here they move the mask as before."""
    import onnxruntime

    decoder = SPEC.decoder
    half = convert(exported.file(decoder.name), decoder, RECIPES[0], tmp_path)
    embedding = np.random.default_rng(0).normal(size=(1, 256, 64, 64)).astype(np.float32)
    moved = []
    for file in (exported.file(decoder.name), half):
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        at = [
            session.run(
                [SPEC.masks],
                {
                    "image_embeddings": embedding,
                    "point_coords": np.full((1, 1, 2), x, np.float32),
                    "point_labels": np.ones((1, 1), np.float32),
                },
            )[0]
            for x in (900.0, 900.2, 910.0)
        ]
        moved.append([float(np.abs(other - at[0]).max()) for other in at[1:]])
    exact, halved = moved
    assert 0 < exact[0] < exact[1]
    # What float16 adds is noise of its own, far below what ten pixels do.
    assert halved == pytest.approx(exact, abs=0.05 * exact[1])


def _pretend(monkeypatch: pytest.MonkeyPatch, answers: Sequence[list[Difference]]) -> None:
    left = iter(answers)
    monkeypatch.setattr(precision, "compare", lambda *_: next(left))


def test_more_is_kept_where_masks_are_wrong(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {model.name: exported.file(model.name) for model in SPEC.models}
    nan = replace(GOOD, mask_iou=float("nan"))
    _pretend(monkeypatch, [[GOOD, BAD], [nan], [GOOD]])
    half = halve(SPEC, exported.predictor(), files, tmp_path)
    assert half.recipe is RECIPES[2]
    assert list(half.failed) == [RECIPES[0].keeps, RECIPES[1].keeps]
    assert half.failed[RECIPES[0].keeps].startswith("one click on photo: logits differ by")
    assert all(path.is_file() for path in half.files.values())

    _pretend(monkeypatch, [[BAD]] * 3)
    with pytest.raises(
        ExportError, match=r"less than 0\.99; nothing was installed\. The worst with"
    ):
        halve(SPEC, exported.predictor(), files, tmp_path / "again")
