"""SAM 3's own: checkpoints that are folders, and what its decoder makes of each kind of prompt."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import Exported
from numpy.typing import NDArray

from triton_sam.errors import CheckpointError, InvalidInputError
from triton_sam.export import sam3
from triton_sam.specs import FAMILIES

SPEC = FAMILIES["sam3"]


@pytest.fixture(scope="module")
def exported_sam3(small: Callable[[str], Exported]) -> Exported:
    return small("sam3")


@pytest.fixture(scope="module")
def model(exported_sam3: Exported) -> Any:
    return exported_sam3.model()


@pytest.fixture(scope="module")
def features(model: Any) -> list[torch.Tensor]:
    """Embeddings of two images."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 32, 288, 288), (2, 64, 144, 144), (2, 256, 72, 72)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.fixture(scope="module")
def decode(exported_sam3: Exported) -> Callable[..., list[NDArray[np.float32]]]:
    """Runs the decoder's graph; without a prompt's part its axis has length zero."""
    path = exported_sam3.file("sam3_decoder")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(features: list[torch.Tensor], batch: int, **inputs: Any) -> Any:
        feeds = {f"image_embeddings.{i}": value.numpy() for i, value in enumerate(features)}
        feeds["input_points"] = np.zeros((batch, 1, 0, 2), np.float32)
        feeds["input_labels"] = np.zeros((batch, 1, 0), np.int64)
        feeds["input_boxes"] = np.zeros((batch, 0, 4), np.float32)
        return session.run(None, feeds | inputs)

    return run


POINTS = np.array([[[[300.0, 500.0], [700.0, 200.0], [11.0, 22.0]]]], np.float32)
BOX = np.array([[[100.0, 150.0, 800.0, 620.0]]], np.float32)
MASK = np.random.default_rng(2).normal(size=(1, 1, 288, 288)).astype(np.float32)
LABELS = {
    "plain": [1, 0, 1],
    "padded": [1, 0, -1],
    "transformers' own padding": [1, -10, -10],
    "corners as points": [2, 3, 1],
}


def official(model: Any, features: list[torch.Tensor], **inputs: Any) -> tuple[Any, Any, Any]:
    tensors = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in inputs.items()
    }
    with torch.no_grad():
        found = model(image_embeddings=features, **tensors)
    return found.iou_scores, found.pred_masks, found.object_score_logits


def assert_same(own: Any, expected: Any, masks: slice = slice(None)) -> None:
    for index, (mine, theirs) in enumerate(zip(own, expected, strict=True)):
        mine = mine[:, :, masks] if index < 2 else mine
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, atol=2e-5 * float(abs(theirs).max()))


@pytest.mark.parametrize("labels", LABELS.values(), ids=list(LABELS))
@pytest.mark.parametrize("boxed", [False, True])
def test_every_label(
    model: Any, features: Any, decode: Any, labels: list[int], boxed: bool
) -> None:
    first = [feature[:1] for feature in features]
    prompt = {"input_points": POINTS, "input_labels": np.array([[labels]])}
    if boxed:
        prompt["input_boxes"] = BOX
    assert_same(decode(first, 1, **prompt), official(model, first, **prompt))


@pytest.mark.parametrize("prompt", ["box", "mask", "mask and box"])
def test_no_points(model: Any, features: Any, decode: Any, prompt: str) -> None:
    first = [feature[:1] for feature in features]
    box = {"input_boxes": BOX} if "box" in prompt else {}
    mask = {"input_masks": MASK} if "mask" in prompt else {}
    flag = {"has_input_masks": np.ones(1, np.float32)} if mask else {}
    assert_same(decode(first, 1, **box, **mask, **flag), official(model, first, **box, **mask))


def test_prompts_about_one_image_and_about_one_each(model: Any, features: Any, decode: Any) -> None:
    points = np.concatenate([POINTS, POINTS[:, :, ::-1] * 0.9])
    labels = np.array([[[1, 0, 1]], [[1, 1, -1]]])
    both = {"input_points": points, "input_labels": labels}
    for shared in (True, False):
        rows = [[feature[0 if shared else i][None] for feature in features] for i in range(2)]
        answers = [
            official(model, row, input_points=points[i : i + 1], input_labels=labels[i : i + 1])
            for i, row in enumerate(rows)
        ]
        expected = [torch.cat(parts) for parts in zip(*answers, strict=True)]
        assert_same(decode(rows[0] if shared else features, 2, **both), expected)


def test_a_mask_for_one_of_two_prompts(model: Any, features: Any, decode: Any) -> None:
    first = [feature[:1] for feature in features]
    prompt = {"input_points": POINTS, "input_labels": np.array([[[1, 0, 1]]])}
    both = {name: np.concatenate([value, value]) for name, value in prompt.items()}
    masks = np.concatenate([MASK, np.zeros_like(MASK)])
    flags = np.array([1, 0], np.float32)
    own = decode(first, 2, **both, input_masks=masks, has_input_masks=flags)
    with_mask = official(model, first, **prompt, input_masks=MASK)
    without = official(model, first, **prompt)
    assert_same(own, [torch.cat(parts) for parts in zip(with_mask, without, strict=True)])


@pytest.mark.parametrize("stable", [True, False])
def test_the_single_mask_comes_first(exported_sam3: Exported, features: Any, stable: bool) -> None:
    """Mask 0 where it is stable, else the best of the others; the next two follow it."""
    model: Any = exported_sam3.model()
    if stable:
        # Large logits: nearly no pixel lies between the two thresholds.
        for parameter in model.mask_decoder.output_hypernetworks_mlps[0].proj_out.parameters():
            parameter.data *= 1e4
    first = [feature[:1] for feature in features]
    prompt = {"input_points": POINTS, "input_labels": np.array([[[1, 0, 1]]])}
    inputs = [torch.from_numpy(value) for value in prompt.values()]
    optional = [torch.zeros(1, 0, 4), torch.from_numpy(MASK), torch.zeros(1), torch.zeros(1)]
    with torch.no_grad():
        scores, masks, objects = sam3.Decoder(model)(*first, *inputs, *optional)
    single = official(model, first, **prompt, multimask_output=False)
    multi = official(model, first, **prompt)
    assert bool((multi[1] == single[1]).flatten(3).all(3).any()) != stable
    assert_same((scores, masks, objects), single, slice(0, 1))
    assert_same((scores[:, :, 1:], masks[:, :, 1:], objects), _first_two(multi))


def _first_two(multi: Any) -> Any:
    return multi[0][:, :, :2], multi[1][:, :, :2], multi[2]


def test_the_official_checkpoint_holds_a_detector_too(
    exported_sam3: Exported, tmp_path: Path
) -> None:
    """As in facebook/sam3, the tracker's weights have prefixes, and others lie beside them."""
    from safetensors.torch import load_file, save_file

    state = load_file(exported_sam3.checkpoint / "model.safetensors")
    renamed = {}
    for name, value in state.items():
        plain = name.removeprefix("tracker_model.")
        plain = plain.replace("tracker_neck.", "vision_encoder.neck.")
        plain = plain.replace("detector_model.vision_encoder.", "vision_encoder.")
        if plain.startswith("vision_encoder.neck."):
            plain = plain.replace("vision_encoder.neck.", "tracker_neck.")
        elif plain.startswith("vision_encoder."):
            plain = f"detector_model.{plain}"
        else:
            plain = f"tracker_model.{plain}"
        renamed[plain] = value
    renamed["detector_model.detr_encoder.layers.0.weight"] = torch.ones(3)
    renamed["tracker_model.memory_attention.layers.0.weight"] = torch.ones(3)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((exported_sam3.checkpoint / "config.json").read_text())
    video = {"model_type": "sam3_video", "tracker_config": config | {"model_type": "sam3_tracker"}}
    (tmp_path / "config.json").write_text(json.dumps(video))
    loaded = sam3.build_model("facebook/sam3", tmp_path).state_dict()
    original = exported_sam3.model().state_dict()
    assert loaded.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(loaded[name], value), name


def _without_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if name.endswith("iou_token.weight"))
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["mask_decoder_config"]["mlp_dim"] = 128
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing; download"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda f: (f / "config.json").write_text("{"), "is damaged or is no SAM 3 checkpoint"),
        (lambda f: (f / "model.safetensors").write_bytes(b"<html>"), "is damaged or is no SAM 3"),
        (_truncate, "is damaged or is no SAM 3 checkpoint"),
        (_without_weight, "1 of its weights are missing .* mask_decoder.iou_token.weight"),
        (_other_shape, "is not a SAM 3 tracker's checkpoint|is damaged or is no SAM 3 checkpoint"),
    ],
)
def test_what_is_no_checkpoint(
    exported_sam3: Exported, tmp_path: Path, fault: Callable[[Path], None], message: str
) -> None:
    for file in exported_sam3.checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    fault(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        sam3.build_model("facebook/sam3", tmp_path)
    assert "\n" not in str(caught.value)


def test_no_folder_and_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json and model\.safetensors is missing"):
        sam3.build_model("facebook/sam3", tmp_path / "none")
    (tmp_path / "sam3.pt").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"sam3\.pt is a file; a SAM 3 checkpoint is a folder"
    ):
        sam3.build_model("facebook/sam3", tmp_path / "sam3.pt")
    with pytest.raises(InvalidInputError, match=r"'none\.yaml' is neither a YAML file nor"):
        sam3.build_model("none.yaml", None)


def test_the_script_says_what_it_takes(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "scripts/export_sam3_to_onnx.py"
    command = [sys.executable, str(script), "--checkpoint", str(tmp_path), "--output-dir"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"No SAM 3 checkpoint at {tmp_path}: config.json and" in done.stderr
