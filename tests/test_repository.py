"""config.pbtxt as committed, and every fault that `check` has to see."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from triton_sam import repository
from triton_sam.errors import RepositoryError
from triton_sam.files import sha256
from triton_sam.specs import FAMILIES, Family, Model, Tensor

COMMITTED = Path(__file__).parent.parent / "model_repository"
SPEC = FAMILIES["sam2"]


def fake_model(model: Model, path: Path) -> None:
    """An ONNX file with ``model``'s inputs and outputs that computes nothing of use."""
    inputs = [_value(tensor) for tensor in model.inputs]
    defaults = [
        numpy_helper.from_array(np.full(t.default[0], t.default[1], np.float32), t.name)
        for t in model.inputs
        if t.default is not None
    ]
    source = model.inputs[0].name
    nodes = [helper.make_node("Identity", [source], [tensor.name]) for tensor in model.outputs]
    outputs = [_value(tensor) for tensor in model.outputs]
    graph = helper.make_graph(nodes, model.name, inputs, outputs, defaults)
    onnx.save(helper.make_model(graph), str(path))


def _value(tensor: Tensor) -> onnx.ValueInfoProto:
    kind = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}[tensor.dtype]
    dims = [f"{tensor.name}_{i}" if n == -1 else n for i, n in enumerate(tensor.dims)]
    return helper.make_tensor_value_info(tensor.name, kind, dims)


def install(root: Path, family: Family = SPEC, sha: str = "a") -> None:
    files = {}
    for model in family.models:
        files[model.name] = root / f"{model.name}.tmp"
        fake_model(model, files[model.name])
    repository.install(root, family, files, {"checkpoint": {"sha256": sha}})


def problems(root: Path) -> list[str]:
    return [str(problem) for problem in repository.check(root)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    install(tmp_path)
    assert problems(tmp_path) == []
    return tmp_path


def test_the_committed_configs_are_the_rendered_ones() -> None:
    for family in FAMILIES.values():
        for model in family.models:
            committed = (COMMITTED / model.name / "config.pbtxt").read_text()
            assert committed == repository.render_config(model.without_ours())
            assert (COMMITTED / model.name / "1" / ".gitkeep").is_file()


def test_configs_parse_as_tritons_own_message() -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    for family in FAMILIES.values():
        for model in family.models:
            config = model_config_pb2.ModelConfig()
            text_format.Parse(repository.render_config(model), config)
            assert config.max_batch_size == 0
            assert config.HasField("dynamic_batching")
            assert config.dynamic_batching.ListFields() == []
            assert [group.count for group in config.instance_group] == [1]
            assert config.instance_group[0].kind == 0  # KIND_AUTO
            assert [t.name for t in config.input if t.optional] == [
                t.name for t in model.inputs if t.optional
            ]
            assert [list(t.dims) for t in config.output] == [list(t.dims) for t in model.outputs]


def test_install_leaves_only_the_model_and_its_manifest(root: Path) -> None:
    folder = root / SPEC.encoder.name / "1"
    assert sorted(path.name for path in folder.iterdir()) == ["export.json", "model.onnx"]
    manifest = json.loads((folder / "export.json").read_text())
    assert manifest["sha256"] == sha256(folder / "model.onnx")


def _swap_graph(change: Callable[[Model], Model]) -> Callable[[Path], None]:
    def fault(root: Path) -> None:
        fake_model(change(SPEC.decoder), root / "sam2_decoder/1/model.onnx")

    return fault


def _without_default(model: Model) -> Model:
    inputs = tuple(replace(t, default=None) if t.name == "mask_input" else t for t in model.inputs)
    return replace(model, inputs=inputs)


def _narrow(model: Model) -> Model:
    first = replace(model.inputs[0], dims=(-1, 128, 64, 64))
    return replace(model, inputs=(first, *model.inputs[1:]))


def _as_int64(model: Model) -> Model:
    outputs = (replace(model.outputs[0], dtype="int64"), *model.outputs[1:])
    return replace(model, outputs=outputs)


def _fewer(model: Model) -> Model:
    return replace(model, outputs=model.outputs[:2])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            lambda root: (root / "sam2_decoder/config.pbtxt").unlink(),
            "config.pbtxt is missing; run `triton-sam configure`",
        ),
        (
            lambda root: (root / "sam2_decoder/config.pbtxt").write_text("max_batch_size: 4"),
            "config.pbtxt differs from the table",
        ),
        (
            lambda root: (root / "sam2_decoder/1/model.onnx").unlink(),
            "1/model.onnx is missing; run `triton-sam export`",
        ),
        (
            lambda root: (root / "sam2_decoder/1/model.onnx").write_bytes(b"\xff" * 64),
            "1/model.onnx is damaged",
        ),
        (
            lambda root: (root / "sam2_decoder/1/export.json").write_text("{"),
            "1/export.json is missing or unreadable",
        ),
        (_swap_graph(_fewer), "is not the file that 1/export.json describes"),
        (_swap_graph(_fewer), "the graph's outputs are ['iou_predictions', 'masks']"),
        (_swap_graph(_without_default), "input 'mask_input' has no default in the graph"),
        (
            _swap_graph(_narrow),
            "input 'image_embeddings' is float32 [-1, 128, 64, 64] in the graph, "
            "float32 [-1, 256, 64, 64] in the table",
        ),
        (_swap_graph(_as_int64), "output 'masks' is int64"),
    ],
)
def test_check_names_each_fault(root: Path, fault: Callable[[Path], None], message: str) -> None:
    fault(root)
    found = problems(root)
    assert any(text.startswith("sam2_decoder: ") and message in text for text in found), found
    assert not any(text.startswith("sam2_encoder") for text in found)


def test_check_sees_a_pair_of_two_checkpoints(root: Path) -> None:
    manifest = root / "sam2_encoder/1/export.json"
    manifest.write_text(manifest.read_text().replace('"a"', '"b"'))
    assert problems(root) == [
        "sam2_decoder: it comes from another checkpoint than sam2_encoder; export both again."
    ]


def test_check_of_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="No model repository at"):
        repository.check(tmp_path / "none")


def test_variants_lie_side_by_side(root: Path) -> None:
    large = SPEC.named("large")
    install(root, large, sha="b")
    assert problems(root) == []
    assert [family.encoder.name for family in repository.installed(root)] == [
        "sam2_encoder",
        "sam2_large_encoder",
    ]
    (root / "sam2_large_decoder/config.pbtxt").write_text("stale")
    assert problems(root) == [
        "sam2_large_decoder: config.pbtxt differs from the table; run `triton-sam configure`."
    ]
    repository.write_configs(root)
    assert problems(root) == []
