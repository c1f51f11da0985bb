"""The exporter: what it writes, that it proves itself, and what it refuses."""

from __future__ import annotations

import hashlib
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import SPEC, Exported, export_apart
from numpy.typing import NDArray

import triton_sam
from triton_sam import SAM2TritonClient, repository
from triton_sam.demo import demo_photo, demo_repository
from triton_sam.errors import CheckpointError, ExportError, InvalidInputError
from triton_sam.export import parity, pipeline, sam1, sam2
from triton_sam.export.checkpoints import checkpoint_from_pair
from triton_sam.export.onnx import trace
from triton_sam.export.parity import OnnxRuntimeTransport
from triton_sam.prompts import Prompt
from triton_sam.protocol import Embedding, Prediction, decode_calls, encode_call, read_prediction
from triton_sam.server import EmbeddedServer
from triton_sam.specs import FAMILIES

DEMO_CFG = "sam2.1_demo.yaml"
ASSETS = Path(triton_sam.__file__).parent / "assets"
ROOT = Path(__file__).parent.parent


_FREED = """
import numpy as np
from triton_sam.export.memory import give_back_memory
from pathlib import Path

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

arrays = [np.ones(1 << 20, np.uint8) for _ in range(400)]
kept = arrays[-1]  # glibc by itself gives back only what lies above all that is in use
del arrays
before = resident_mb()
give_back_memory()
print(before, resident_mb())
"""


def test_freed_memory_is_given_back() -> None:
    # So that arrays of this size are no mappings of their own, as most weights are none.
    environment = {**os.environ, "MALLOC_MMAP_MAX_": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", _FREED], env=environment, capture_output=True, text=True, check=True
    )
    before, after = map(int, ran.stdout.split())
    assert before > 400
    assert after < before - 350


def test_the_repository_is_as_the_table_says(each: Exported) -> None:
    assert repository.check(each.repository) == []
    assert not list(each.repository.glob(".export-*"))


def test_the_demo_model_is_as_the_table_says() -> None:
    assert repository.check(demo_repository()) == []
    packed = sum(file.stat().st_size for file in ASSETS.glob("*.onnx.xz"))
    assert packed < 8_000_000


def test_every_prompt_kind_was_compared_and_means_something(each: Exported) -> None:
    titles = {difference.prompt for difference in each.differences}
    assert {"one click", "box and clicks, multimask", "mask alone", "16 prompts"} <= titles
    assert {difference.image for difference in each.differences} == {"noise", "photo"}
    assert all(difference.within_tolerance for difference in each.differences)
    # Both kinds of pixels are there, so that the overlap of masks is no accident.
    assert all(0.001 < difference.foreground < 0.999 for difference in each.differences)
    assert all(d.max_difference < 1e-4 * d.max_logit for d in each.differences)


def test_the_manifest_tells_where_the_pair_came_from(each: Exported) -> None:
    for model in each.family.models:
        manifest = each.manifest(model.name)
        origin = repository.describe_checkpoint(each.checkpoint)
        assert manifest["checkpoint"] == {"file": each.checkpoint.name, **origin}
        assert manifest["precision"] == "fp32"
        assert manifest["versions"]["torch"] == torch.__version__
        assert len(manifest["parity"]) == len(each.differences)
        assert manifest["opset"] <= 20 and manifest["ir_version"] <= 10


def test_files_load_in_every_pinned_container(each: Exported) -> None:
    for model in each.family.models:
        proto = onnx.load(str(each.file(model.name)))
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


def test_a_batch_of_images_is_each_image(each: Exported) -> None:
    spec = each.family
    models = OnnxRuntimeTransport({model.name: each.file(model.name) for model in spec.models})
    encoder, decoder = (models.served(model.name) for model in spec.models)
    size = (spec.image.size, spec.image.size)
    images = np.random.default_rng(3).random((2, 3, *size), np.float32)
    points = np.array([[[200, 300]], [[700, 900]]])
    prompt = Prompt.create(
        points, [[1], [1]], original_size=size, layout=spec.prompts, multimask_output=True
    )

    def run(pixels: NDArray[np.float32], prompt: Prompt) -> tuple[Embedding, Prediction]:
        call = encode_call(spec, pixels, encoder)
        embedding = Embedding(models.infer(call), size, "", spec.name)
        calls = decode_calls(spec, embedding, prompt, decoder)
        answers = [models.infer(call) for call in calls]
        return embedding, read_prediction(spec, answers, prompt, decoder)

    together, both = run(images, prompt)
    for index, single in enumerate(prompt.split()):
        alone, one = run(images[index : index + 1], single)
        for name, feature in alone.tensors.items():
            difference = together.tensors[name][index] - feature[0]
            assert abs(difference).max() <= 1e-5 * abs(feature).max(), name
        assert abs(both.logits[index] - one.logits[0]).max() <= 1e-4 * abs(one.logits).max()


def test_positions_are_not_resized_for_each_image(exported: Exported) -> None:
    """ONNX Runtime would repeat a bicubic Resize, a fifth of its time for an image."""
    encoder = onnx.load(exported.repository / SPEC.encoder.name / "1/model.onnx")
    modes = [
        attribute.s
        for node in encoder.graph.node
        if node.op_type == "Resize"
        for attribute in node.attribute
        if attribute.name == "mode"
    ]
    assert modes and b"cubic" not in modes

    model: Any = exported.model()
    trunk = model.image_encoder.trunk
    ours = sam2.Encoder(model, SPEC.image).positions()
    side = SPEC.image.size // 4
    official = trunk._get_pos_embed((side, side))
    assert ours.shape == official.shape
    assert abs(ours - official).max() <= 1e-5 * abs(official).max()


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


def test_a_checkpoint_that_is_a_folder_has_one_hash(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    described = repository.describe_checkpoint(tmp_path)
    listed = subprocess.run("sha256sum *", shell=True, cwd=tmp_path, stdout=subprocess.PIPE)
    assert described == {"sha256": hashlib.sha256(listed.stdout).hexdigest(), "bytes": 9}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No checkpoint at"),
        (b"", "is damaged or is not a PyTorch checkpoint"),
        (b"PK\x03\x04 half a file", "is damaged or is not a PyTorch checkpoint"),
        ({"weights": {}}, r"is not a SAM \d checkpoint: expected"),
    ],
)
@pytest.mark.parametrize("wrapper", [sam1, sam2])
def test_what_is_no_checkpoint(
    wrapper: ModuleType, tmp_path: Path, content: object, message: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        wrapper.read_state_dict(path)


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
    with pytest.raises(InvalidInputError, match=r"'none\.yaml' is neither vit_h, vit_l or vit_b"):
        sam1.build_model("none.yaml", None)
    (tmp_path / "own.yaml").write_text("embed_dim: 32\ndepth: 2\n")
    with pytest.raises(InvalidInputError, match=r"own\.yaml must have exactly the keys embed_dim"):
        sam1.build_model(str(tmp_path / "own.yaml"), None)
    with pytest.raises(InvalidInputError, match="Device 'cuda:77' is not available"):
        pipeline.export(SPEC, "demo", exported.checkpoint, tmp_path, device="cuda:77")


def test_the_script_with_the_documented_arguments(exported: Exported, tmp_path: Path) -> None:
    script = ROOT / "scripts/export_sam2_to_onnx.py"
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


def test_the_scripts_call_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / "scripts/export_sam1_to_onnx.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--checkpoint", "none/sam_vit_l_0b3195.pth"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "sam1 vit_l:" in said
    assert "No checkpoint at none/sam_vit_l_0b3195.pth" in said.splitlines()[-1]


@pytest.fixture
def external(small: Callable[[str], Exported], tmp_path: Path) -> Path:
    """A SAM 1 repository as one of more than 2 GB is written: weights beside the graphs."""
    spec = FAMILIES["sam1"]
    modules = sam1.modules(small("sam1").model(), spec)
    files = {}
    for model in spec.models:
        module, examples = modules[model.name]
        folder = tmp_path / model.name
        folder.mkdir()
        files[model.name] = trace(module, model, examples, folder, max_inline_bytes=1000)
        assert sorted(path.name for path in folder.iterdir()) == [model.file, model.data_file]
    repository.install(tmp_path / "repository", spec, files, {})
    return tmp_path / "repository"


def test_weights_beside_the_graph_are_served(
    external: Path, small: Callable[[str], Exported]
) -> None:
    assert repository.check(external) == []
    inline = small("sam1")
    photo = demo_photo().resize((64, 48))
    results = []
    for root in (inline.repository, external):
        for model in inline.family.models:
            graph = root / model.name / "1" / model.file
            assert (graph.stat().st_size < 600_000) == (root == external)
        with (
            EmbeddedServer(root) as server,
            # What the predictor runs is the pair's in one of them alone.
            SAM2TritonClient(server.url, "sam1", embedding="client") as client,
        ):
            client.set_image(photo)
            results.append(client.segment([[20, 20]], [1], box=[10, 10, 40, 40]))
    np.testing.assert_array_equal(results[0].logits, results[1].logits)
    np.testing.assert_array_equal(results[0].scores, results[1].scores)


def test_a_changed_data_file_is_seen(external: Path) -> None:
    data = external / "sam1_decoder/1/model.onnx_data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert [str(problem) for problem in repository.check(external)] == [
        "sam1_decoder: 1/model.onnx_data is not the file that 1/export.json describes; "
        "export it again."
    ]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tiny", "small", "base_plus", "large"])
def test_every_variant_exports(variant: str, tmp_path: Path) -> None:
    result = export_apart("sam2", variant, tmp_path)
    assert repository.check(result.repository) == []
    assert result.manifest("sam2_encoder")["peak_memory_mb"] < 12_000
