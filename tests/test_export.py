"""The exporter: what it writes, that it proves itself, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from conftest import SPEC, Exported, export_random

import triton_sam
from triton_sam import repository
from triton_sam.demo import demo_repository
from triton_sam.errors import CheckpointError, ExportError, InvalidInputError
from triton_sam.export import parity, pipeline, sam2
from triton_sam.export.checkpoints import checkpoint_from_pair

DEMO_CFG = "sam2.1_demo.yaml"
ASSETS = Path(triton_sam.__file__).parent / "assets"


def test_the_repository_is_as_the_table_says(exported: Exported) -> None:
    assert repository.check(exported.repository) == []
    assert not list(exported.repository.glob(".export-*"))


def test_the_demo_model_is_as_the_table_says() -> None:
    assert repository.check(demo_repository()) == []
    packed = sum(file.stat().st_size for file in ASSETS.glob("*.onnx.xz"))
    assert packed < 8_000_000


def test_every_prompt_kind_was_compared_and_means_something(exported: Exported) -> None:
    titles = {difference.prompt for difference in exported.differences}
    assert {"one click", "box and clicks, multimask", "mask alone", "16 prompts"} <= titles
    assert {difference.image for difference in exported.differences} == {"noise", "photo"}
    assert all(difference.within_tolerance for difference in exported.differences)
    # Both kinds of pixels are there, so that the overlap of masks is no accident.
    assert all(0.001 < difference.foreground < 0.999 for difference in exported.differences)
    assert all(d.max_difference < 1e-4 * d.max_logit for d in exported.differences)


def test_the_manifest_tells_where_the_pair_came_from(exported: Exported) -> None:
    for model in SPEC.models:
        manifest = json.loads((exported.repository / model.name / "1/export.json").read_text())
        assert manifest["checkpoint"]["sha256"] == repository.sha256(exported.checkpoint)
        assert manifest["versions"]["torch"] == torch.__version__
        assert len(manifest["parity"]) == len(exported.differences)
        assert manifest["opset"] <= 20 and manifest["ir_version"] <= 10


def test_files_load_in_every_pinned_container(exported: Exported) -> None:
    for model in SPEC.models:
        proto = onnx.load(str(exported.repository / model.name / "1/model.onnx"))
        assert proto.ir_version <= 10
        assert [(entry.domain, entry.version <= 20) for entry in proto.opset_import] == [("", True)]
        assert not any(node.doc_string for node in proto.graph.node)


def test_weights_keep_their_names_and_values(exported: Exported, tmp_path: Path) -> None:
    files = [exported.repository / model.name / "1/model.onnx" for model in SPEC.models]
    copy = checkpoint_from_pair(files[0], files[1], DEMO_CFG, tmp_path / "copy.pt")
    own, original = sam2.read_state_dict(copy), sam2.read_state_dict(exported.checkpoint)
    video_only = ("memory", "maskmem", "no_mem_pos", "mask_downsample", "obj_ptr", "no_obj")
    for name, value in original.items():
        if not name.startswith(video_only):
            assert torch.equal(value, own[name]), name


def test_a_batch_of_images_is_each_image(exported: Exported) -> None:
    path = exported.repository / SPEC.encoder.name / "1/model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = torch.rand(2, 3, 1024, 1024, generator=torch.Generator().manual_seed(3)).numpy()
    together = session.run(None, {"image": images})
    for index in range(2):
        alone = session.run(None, {"image": images[index : index + 1]})
        for whole, single in zip(together, alone, strict=True):
            assert abs(whole[index] - single[0]).max() <= 1e-5 * abs(single).max()


def test_outside_tolerance_nothing_is_installed(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "LOGIT_TOLERANCE", 1e-12)
    with pytest.raises(ExportError, match=r"differs .* nothing was installed\. The first: one cl"):
        pipeline.export(SPEC, "demo", exported.checkpoint, tmp_path / "repository")
    assert list((tmp_path / "repository").iterdir()) == []


def test_a_checkpoint_of_another_variant(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"demo\.pt does not belong to configs/sam2\.1/sam2"):
        pipeline.export(SPEC, "tiny", exported.checkpoint, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No checkpoint at"),
        (b"", "is damaged or is not a PyTorch checkpoint"),
        (b"PK\x03\x04 half a file", "is damaged or is not a PyTorch checkpoint"),
        ({"weights": {}}, "is not a SAM 2 checkpoint: expected"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        sam2.read_state_dict(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"model": Touch()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="is damaged or is not"):
        sam2.read_state_dict(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_unknown_configuration_and_device(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"'none\.yaml' is neither a file nor one of"):
        sam2.build_model("none.yaml", None)
    with pytest.raises(InvalidInputError, match="Device 'cuda:77' is not available"):
        pipeline.export(SPEC, "demo", exported.checkpoint, tmp_path, device="cuda:77")


def test_the_script_with_the_documented_arguments(exported: Exported, tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "scripts/export_sam2_to_onnx.py"
    command = [sys.executable, str(script), "--checkpoint", str(exported.checkpoint)]
    command += ["--model-cfg", DEMO_CFG, "--output-dir", str(tmp_path)]
    wrong = subprocess.run([*command, "--image-size", "512"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "know only 1024" in wrong.stderr
    subprocess.run([*command, "--image-size", "1024", "--device", "cpu"], check=True)
    for model in SPEC.models:
        written = tmp_path / model.name / "1/model.onnx"
        twin = exported.repository / model.name / "1/model.onnx"
        assert written.read_bytes() == twin.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tiny", "small", "base_plus", "large"])
def test_every_variant_exports(variant: str, tmp_path: Path) -> None:
    result = export_random(variant, tmp_path)
    assert repository.check(result.repository) == []
    manifest = json.loads((result.repository / "sam2_encoder/1/export.json").read_text())
    assert manifest["peak_memory_mb"] < 12_000
