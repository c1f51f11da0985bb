"""A SAM 3 pair that others publish, with a stand-in made here: installed, served and compared."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import Exported
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from PIL import Image
from torch import Tensor, nn

import triton_sam
from triton_sam import SAM2TritonClient, cli, published, repository
from triton_sam.errors import CheckpointError, InvalidInputError, PromptError, SamError
from triton_sam.export.parity import OnnxRuntimeTransport, Predictor
from triton_sam.images import load_image
from triton_sam.protocol import Call
from triton_sam.server import EmbeddedServer
from triton_sam.specs import FAMILIES, Model

SPEC = FAMILIES["sam3"]
PAIR = [replace(model.without_ours(), name=model.name) for model in SPEC.models]
NAMES = {model.name: Path(model.file).stem for model in SPEC.models}


class PublishedDecoder(nn.Module):
    """Only the contract's inputs, always three masks, one prompt an embedding."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        fine: Tensor,
        middle: Tensor,
        coarse: Tensor,
        points: Tensor,
        labels: Tensor,
        boxes: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        corners = boxes.reshape(boxes.shape[0], 1, -1, 2)
        corner_labels = (
            torch.zeros_like(corners[..., 0], dtype=torch.int64)
            + torch.tensor([2, 3])[: corners.shape[2]]
        )
        encoder, decoder = self.model.prompt_encoder, self.model.mask_decoder
        sparse = encoder._embed_points(
            torch.cat([points, corners], 2), torch.cat([labels, corner_labels], 2), pad=True
        )
        masks, scores, _, object_scores = decoder(
            image_embeddings=coarse,
            image_positional_embeddings=self.model.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=encoder.no_mask_embed.weight.reshape(1, -1, 1, 1),
            multimask_output=True,
            high_resolution_features=[fine, middle],
        )
        return scores, masks, object_scores


def trace(module: nn.Module, model: Model, examples: tuple[Tensor, ...], path: Path) -> None:
    axes = {
        t.name: {i: f"{t.name}_{i}" for i, length in enumerate(t.dims) if length == -1}
        for t in model.inputs + model.outputs
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            examples,
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=[t.name for t in model.inputs],
            output_names=[t.name for t in model.outputs],
            dynamic_axes=axes,
        )


def save(proto: onnx.ModelProto, path: Path, parts: int) -> None:
    """Write ``proto`` with its weights in ``parts`` files beside it."""
    names = [f"{path.name}_data{f'_{i}' if i else ''}" for i in range(parts)]
    ends = dict.fromkeys(names, 0)
    large = [tensor for tensor in proto.graph.initializer if len(tensor.raw_data) > 256]
    for index, tensor in enumerate(large):
        name = names[index * parts // len(large)]
        with (path.parent / name).open("ab") as file:
            file.write(tensor.raw_data)
        set_external_data(tensor, name, ends[name], len(tensor.raw_data))
        ends[name] += len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
    onnx.save(proto, str(path))


@pytest.fixture(scope="module")
def official(small: Callable[[str], Exported]) -> Exported:
    return small("sam3")


@pytest.fixture(scope="module")
def predictor(official: Exported) -> Predictor:
    return official.predictor()


@pytest.fixture(scope="module")
def downloaded(official: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair in float32 and in float16, borders and all, as a download leaves it."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    folder = tmp_path_factory.mktemp("sam3-tracker-onnx")
    (folder / "onnx").mkdir()
    encoder, decoder = PAIR
    shapes = [(1, 32, 288, 288), (1, 64, 144, 144), (1, 256, 72, 72), (1, 1, 3, 2), (1, 1, 3)]
    examples = [torch.ones(shape) for shape in [*shapes, (1, 1, 4)]]
    examples[4] = examples[4].long()
    traced = folder / "decoder.onnx"
    trace(PublishedDecoder(official.model()), decoder, tuple(examples), traced)
    for model, source in ((encoder, official.file(encoder.name)), (decoder, traced)):
        stem = folder / "onnx" / NAMES[model.name]
        save(onnx.load(str(source)), stem.with_suffix(".onnx"), parts=1)
        half = convert_float_to_float16(onnx.load(str(source)), keep_io_types=False)
        save(half, Path(f"{stem}_fp16.onnx"), parts=2)
    traced.unlink()
    return folder


def files(root: Path) -> dict[str, Path]:
    return {model.name: root / model.name / "1" / model.file for model in SPEC.models}


def photo() -> Image.Image:
    return load_image(Path(triton_sam.__file__).parent / "assets/coffee.jpg")


@pytest.fixture(scope="module")
def installed(downloaded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    published.install(SPEC, downloaded, root)
    return root


def test_the_repository_is_as_the_table_says(installed: Path, downloaded: Path) -> None:
    assert repository.check(installed) == []
    for name, path in files(installed).items():
        assert sorted(file.name for file in path.parent.iterdir()) == sorted(
            [path.name, f"{path.name}_data", "export.json"]
        )
        manifest = json.loads((path.parent / "export.json").read_text())
        origin = manifest["published"]
        assert (origin["repository"], origin["precision"]) == (
            "onnx-community/sam3-tracker-ONNX",
            "fp32",
        )
        for file, described in origin["models"][name]["files"].items():
            source = downloaded / "onnx" / file
            assert described == repository.describe_file(source)
        assert "optional" not in (path.parent.parent / "config.pbtxt").read_text()
    assert not list(installed.glob(".published-*"))


class Counting:
    """Passes calls on, and counts them."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.calls = inner, 0

    def infer(self, call: Call, timeout_s: float | None = None) -> Any:
        self.calls += 1
        return self.inner.infer(call, timeout_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


POINTS = np.array([[300.0, 168.0], [150.0, 350.0]], np.float32)
BOX = np.array([75.0, 100.0, 398.0, 332.0], np.float32)
PROMPTS: dict[str, dict[str, Any]] = {
    "click": {"point_coords": POINTS[:1], "point_labels": np.array([1])},
    "clicks": {"point_coords": POINTS, "point_labels": np.array([1, 0])},
    "box": {"box": BOX},
    "box and clicks": {"box": BOX, "point_coords": POINTS, "point_labels": np.array([0, 1])},
    "3 prompts": {
        "point_coords": np.stack([POINTS, POINTS + 20, POINTS / 2]),
        "point_labels": np.array([[1, 1], [1, 0], [1, -1]]),
    },
}


def test_the_served_masks_are_the_official_ones(installed: Path, predictor: Predictor) -> None:
    predictor.set_image(photo())
    with EmbeddedServer(installed) as server, SAM2TritonClient(server.url, "sam3") as client:
        client.set_image(photo())
        for prompt in PROMPTS.values():
            _, scores, logits = predictor.predict(**prompt, multimask_output=True)
            own, own_scores = client.predict(**prompt, multimask_output=True)
            np.testing.assert_allclose(own, logits, atol=1e-4 * abs(logits).max())
            np.testing.assert_allclose(own_scores, scores, atol=1e-4)
            # This pair cannot choose a single mask: the client takes the best of three.
            single, best = client.predict(**prompt)
            rows = np.arange(len(scores))
            np.testing.assert_array_equal(single[:, 0], own[rows, scores.argmax(1)])
            np.testing.assert_array_equal(best[:, 0], own_scores.max(1))
        with pytest.raises(PromptError, match=r"'sam3_decoder' .* takes no 'input_masks'"):
            client.predict(mask_input=single[:1])


def test_each_prompt_is_a_call_of_its_own(installed: Path) -> None:
    transport = Counting(OnnxRuntimeTransport(files(installed)))
    with SAM2TritonClient(transport=transport, model_type="sam3") as client:
        client.set_image(photo())
        transport.calls = 0
        client.predict(**PROMPTS["3 prompts"], multimask_output=True)
        assert transport.calls == 3


def test_float16_borders_become_float32(
    downloaded: Path, predictor: Predictor, tmp_path: Path
) -> None:
    published.install(SPEC, downloaded / "onnx", tmp_path, "fp16")
    assert repository.check(tmp_path) == []
    manifest = repository.read_manifest(tmp_path, "sam3_decoder")
    assert manifest is not None and manifest["variant"] == "fp16"
    assert "pred_masks" in manifest["published"]["models"]["sam3_decoder"]["widened"]
    assert len(manifest["published"]["models"]["sam3_decoder"]["files"]) == 3
    for path in files(tmp_path).values():
        half, whole = (sum(f.stat().st_size for f in path.parent.glob("*_data")), path)
        assert 0 < half < 0.6 * 9_200_000 and whole.is_file()
    predictor.set_image(photo())
    with SAM2TritonClient(
        transport=OnnxRuntimeTransport(files(tmp_path)), model_type="sam3"
    ) as client:
        client.set_image(photo())
        masks, _, logits = predictor.predict(**PROMPTS["clicks"], multimask_output=True)
        own = client.segment(**PROMPTS["clicks"], multimask_output=True)
        np.testing.assert_allclose(own.logits[0], logits[0], atol=0.02 * abs(logits).max())
        assert (own.masks == masks).mean() > 0.99


def fake_pair(folder: Path, models: list[Model] = PAIR, ir_version: int = 8) -> None:
    """Files with the contract's inputs and outputs and some weights, which compute nothing."""
    for model in models:
        weights = numpy_helper.from_array(np.arange(256, dtype=np.float32), "weights")
        nodes = [helper.make_node("Identity", ["weights"], [t.name]) for t in model.outputs]
        graph = helper.make_graph(
            nodes, model.name, [_value(t) for t in model.inputs], [_value(t) for t in model.outputs]
        )
        graph.initializer.append(weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        proto.ir_version = ir_version
        save(proto, folder / model.file, parts=1)


def _value(tensor: Any) -> onnx.ValueInfoProto:
    kind = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}[tensor.dtype]
    dims = [f"{tensor.name}_{i}" if n == -1 else n for i, n in enumerate(tensor.dims)]
    return helper.make_tensor_value_info(tensor.name, kind, dims)


def _point_elsewhere(location: str) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        path = folder / "prompt_encoder_mask_decoder.onnx"
        proto = onnx.load(str(path), load_external_data=False)
        proto.graph.initializer[0].external_data[0].value = location
        onnx.save(proto, str(path))

    return fault


def _another_model(folder: Path) -> None:
    fake_pair(folder, [PAIR[0], replace(PAIR[1], inputs=PAIR[1].inputs[:-1])])


DECODER = "prompt_encoder_mask_decoder.onnx"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda f: (f / DECODER).unlink(), f"No {DECODER} in .*; download it first"),
        (lambda f: (f / DECODER).write_bytes(b"<html>"), "damaged or is no ONNX file"),
        (lambda f: (f / DECODER).write_bytes(b""), "without a graph"),
        (lambda f: (f / f"{DECODER}_data").unlink(), f"{DECODER}_data is missing"),
        (
            lambda f: (f / f"{DECODER}_data").write_bytes(b"short"),
            f"{DECODER}_data has 5 bytes, and the model needs 1024",
        ),
        (_point_elsewhere("../weights"), r"data in '\.\./weights'; expected a file beside"),
        (_point_elsewhere("/etc/passwd"), "expected a file beside"),
        (_point_elsewhere(".."), "expected a file beside"),
        (_another_model, "is not sam3_decoder as the table has it: the graph's inputs are"),
    ],
)
def test_a_fault_installs_nothing(
    tmp_path: Path, fault: Callable[[Path], None], message: str
) -> None:
    folder, root = tmp_path / "from", tmp_path / "repository"
    folder.mkdir()
    fake_pair(folder)
    published.install(SPEC, folder, root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    fault(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        published.install(SPEC, folder, root)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_unknown_precision_and_family(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no precision 'fp64'; choose one of: fp32, fp16"):
        published.install(SPEC, tmp_path, tmp_path / "root", "fp64")
    with pytest.raises(InvalidInputError, match=r"Nobody publishes an ONNX pair of SAM 2\.1"):
        published.install(FAMILIES["sam2"], tmp_path, tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_links_become_real_files(tmp_path: Path) -> None:
    # The hub's own cache holds links to files that are named by their hash.
    blobs, folder, root = (tmp_path / name for name in ("blobs", "snapshot", "repository"))
    blobs.mkdir()
    folder.mkdir()
    fake_pair(blobs)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)
    published.install(SPEC, folder, root)
    for path in root.rglob("*.onnx*"):
        assert path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1
    assert repository.check(root) == []


def test_formats_that_older_servers_do_not_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_pair(tmp_path, ir_version=12)
    with caplog.at_level(logging.WARNING, logger="triton_sam"):
        published.install(SPEC, tmp_path, tmp_path / "root")
    assert "vision_encoder.onnx has IR 12 and opset 17" in caplog.text


def test_both_roads_in_turn_under_one_config(tmp_path: Path, official: Exported) -> None:
    """The pair of others over ours, and what is left of ours is told apart."""
    root, folder = tmp_path / "repository", tmp_path / "from"
    folder.mkdir()
    fake_pair(folder)
    for model in SPEC.models:
        shutil.copytree(official.file(model.name).parent, root / model.name / "1")
    repository.write_configs(root, [SPEC])
    assert repository.check(root) == []
    ours = (root / "sam3_decoder/config.pbtxt").read_text()
    published.install(SPEC, folder, root)
    assert repository.check(root) == []
    theirs = (root / "sam3_decoder/config.pbtxt").read_text()
    kept = [line.rstrip(",") for line in theirs.splitlines()]
    assert [line for line in kept if line not in [o.rstrip(",") for o in ours.splitlines()]] == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_pair(tmp_path)
    root = tmp_path / "repository"
    command = ["install-published", "sam3", "--from", str(tmp_path), "--repository", str(root)]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.splitlines() == [str(path) for path in files(root).values()]
    assert cli.main([*command, "--precision", "q4"]) == 1
    assert "No vision_encoder_q4.onnx in" in capsys.readouterr().err
    assert issubclass(CheckpointError, SamError)
