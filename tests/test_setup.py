"""Setting a family up: each step where it is needed, and nowhere else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import create_autospec

import fakehub
import pytest
from conftest import SPEC, Exported
from fakehost import Host, hosted

from triton_sam import cli, published
from triton_sam.downloads import Patience, Store
from triton_sam.errors import ChecksumError, InvalidInputError, OfflineError, RepositoryError
from triton_sam.export import pipeline
from triton_sam.repository import describe_file
from triton_sam.setup import Setup, Step, export_checkpoint, install_published
from triton_sam.specs import FAMILIES, Family

IMPATIENT = Patience(connect_s=2, stall_s=2, attempts=2, first_wait_s=0.01, longest_wait_s=0.02)


@dataclass
class Bench:
    """A family whose checkpoint a local server has, and an exporter that counts its calls."""

    family: Family
    host: Host
    exported: Exported
    folder: Path
    calls: list[str] = field(default_factory=list)

    def export(
        self,
        family: Family,
        variant: str,
        checkpoint: Path,
        root: Path,
        default: bool,
        precision: str,
    ) -> None:
        """Put in place what the real exporter made of the same checkpoint, in float32."""
        assert describe_file(checkpoint) == describe_file(self.exported.checkpoint)
        self.calls.append(variant)
        served = family if default else family.named(variant)
        for own, model in zip(SPEC.models, served.models, strict=True):
            made = self.exported.repository / own.name / "1"
            shutil.copytree(made, root / model.name / "1", dirs_exist_ok=True)
            manifest = root / model.name / "1/export.json"
            said = json.loads(manifest.read_text())
            manifest.write_text(json.dumps(said | {"precision": precision}))

    def setup(self, **changes: object) -> Setup:
        store = Store(patience=IMPATIENT)
        setup = Setup(
            self.family,
            self.folder / "repository",
            self.folder / "checkpoints",
            store=store,
            export=self.export,
        )
        return replace(setup, **changes)  # type: ignore[arg-type]

    def skipped(self, **changes: object) -> dict[str, bool]:
        return {step.name: step.skipped for step in self.setup(**changes).run()}


DONE = {"download": False, "configure": False, "export": False, "verify": False}
RIGHT = dict.fromkeys(DONE, True)


@pytest.fixture
def bench(exported: Exported, tmp_path: Path) -> Iterator[Bench]:
    content = exported.checkpoint.read_bytes()
    with hosted(lambda request: request.serve(content)) as host:
        about = describe_file(exported.checkpoint)
        variant = replace(
            SPEC.variant("demo"),
            url=f"{host.url}/demo.pt",
            nbytes=about["bytes"],
            sha256=about["sha256"],
        )
        family = replace(SPEC, variants=MappingProxyType({"demo": variant}), default_variant="demo")
        yield Bench(family, host, exported, tmp_path)


def test_the_second_run_does_nothing(bench: Bench) -> None:
    assert bench.skipped() == DONE
    assert bench.calls == ["demo"]
    assert bench.skipped() == RIGHT
    assert bench.calls == ["demo"]
    assert len(bench.host.seen) == 1


def test_another_variant_lies_beside_the_default(bench: Bench) -> None:
    variants = {**SPEC.variants, **bench.family.variants}
    bench.family = replace(SPEC, variants=MappingProxyType(variants))
    assert bench.skipped(variant="demo") == DONE
    assert bench.skipped(variant="demo") == RIGHT
    models = {path.name for path in (bench.folder / "repository").iterdir()}
    assert models == {f"sam2_demo_{part}" for part in ("encoder", "decoder", "predictor")}
    assert bench.skipped(variant="demo", default=True) == {**DONE, "download": True}
    assert bench.skipped(variant="demo", default=True) == RIGHT
    assert bench.calls == ["demo", "demo"]


def test_another_precision_is_another_export(bench: Bench) -> None:
    assert bench.skipped() == DONE
    again = {**RIGHT, "export": False, "verify": False}
    for precision in ("fp16", "fp32"):
        assert bench.skipped(precision=precision) == again
        assert bench.skipped(precision=precision) == RIGHT
    assert len(bench.calls) == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sam3", ("onnx", None, "fp32")),
        ("sam3 --variant q4", ("onnx", None, "q4")),
        ("sam3 --precision fp16", ("onnx", None, "fp16")),
        ("sam3 --from checkpoint --precision fp16", ("checkpoint", None, "fp16")),
        ("sam2 --variant large", ("checkpoint", "large", "fp32")),
        ("sam2 --variant large --precision fp16", ("checkpoint", "large", "fp16")),
    ],
)
def test_what_the_command_sets_up(
    words: str, expected: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(self: Setup) -> Iterator[Step]:
        asked.append((self.road, self.variant, self.precision))
        return iter(())

    monkeypatch.setattr(Setup, "run", run)
    assert cli.main(["setup", *words.split()]) == 0
    assert asked == [expected]


def test_the_real_exporter_and_installer_are_given_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, install = create_autospec(pipeline.export), create_autospec(published.install)
    monkeypatch.setattr(pipeline, "export", export)
    monkeypatch.setattr(published, "install", install)
    export_checkpoint(SPEC, "tiny", tmp_path / "tiny.pt", tmp_path, True, "fp16")
    export.assert_called_once_with(
        SPEC, "tiny", tmp_path / "tiny.pt", tmp_path, default=True, precision="fp16"
    )
    install_published(FAMILIES["sam3"], tmp_path / "from", tmp_path, "q4")
    install.assert_called_once_with(FAMILIES["sam3"], tmp_path / "from", tmp_path, "q4")


def test_a_published_pair_has_one_precision(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["setup", "sam3", "--variant", "q4", "--precision", "fp16"]) == 1
    assert "give --variant or --precision" in capsys.readouterr().err


def test_the_published_pair_goes_to_the_installer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def install(family: Family, folder: Path, root: Path, precision: str) -> None:
        names = sorted(path.name for path in folder.glob("[!.]*.onnx*") if path.suffix != ".sha256")
        given.extend([family.name, names, root, precision])

    with hosted(fakehub.answer) as host:
        monkeypatch.setenv("HF_ENDPOINT", host.url)
        setup = Setup(
            FAMILIES["sam3"],
            tmp_path / "repository",
            tmp_path,
            road="onnx",
            precision="q4",
            store=Store(patience=IMPATIENT),
            install=install,
        )
        # Nothing was installed, and the last step says so.
        with pytest.raises(RepositoryError, match=r"1/vision_encoder\.onnx is missing"):
            list(setup.run())
    names = ["prompt_encoder_mask_decoder_q4.onnx", "vision_encoder_q4.onnx"]
    assert given == ["sam3", [*names, "vision_encoder_q4.onnx_data"], tmp_path / "repository", "q4"]


def test_force_does_all_of_it_again(bench: Bench) -> None:
    bench.skipped()
    again = bench.skipped(store=Store(force=True, patience=IMPATIENT))
    assert again == {**DONE, "configure": True}
    assert bench.calls == ["demo", "demo"]


def test_a_damaged_model_is_exported_again(bench: Bench) -> None:
    bench.skipped()
    model = bench.folder / "repository/sam2_decoder/1/model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    assert bench.skipped() == {**RIGHT, "export": False, "verify": False}
    assert bench.skipped() == RIGHT


def test_a_stale_config_is_written_again_without_an_export(bench: Bench) -> None:
    bench.skipped()
    config = bench.folder / "repository/sam2_encoder/config.pbtxt"
    right = config.read_text()
    config.write_text(right.replace("max_batch_size: 0", "max_batch_size: 4"))
    assert bench.skipped() == {**RIGHT, "configure": False}
    assert config.read_text() == right


def test_a_damaged_checkpoint_is_fetched_again_without_an_export(bench: Bench) -> None:
    bench.skipped()
    checkpoint = bench.folder / "checkpoints/sam2.1_demo.pt"
    checkpoint.write_bytes(b"cut short")
    assert bench.skipped() == {**RIGHT, "download": False}
    assert describe_file(checkpoint) == describe_file(bench.exported.checkpoint)


def test_a_model_of_another_checkpoint_is_exported_again(bench: Bench) -> None:
    bench.skipped()
    for model in SPEC.models:
        manifest = bench.folder / "repository" / model.name / "1/export.json"
        sha256 = describe_file(bench.exported.checkpoint)["sha256"]
        manifest.write_text(manifest.read_text().replace(sha256, "0" * 64))
    assert bench.skipped() == {**RIGHT, "export": False, "verify": False}


def test_what_cannot_be_downloaded_leaves_the_repository_alone(bench: Bench) -> None:
    bench.skipped()
    (bench.folder / "checkpoints/sam2.1_demo.pt").unlink()
    bench.host.answer = lambda request: request.status(200, b"no checkpoint")
    before = sorted((bench.folder / "repository").rglob("*"))
    with pytest.raises(ChecksumError):
        bench.skipped()
    with pytest.raises(OfflineError):
        bench.skipped(store=Store(offline=True))
    assert sorted((bench.folder / "repository").rglob("*")) == before
    assert bench.calls == ["demo"]


def test_an_export_that_is_not_as_the_table_says_is_told(bench: Bench) -> None:
    def half(*arguments: Any) -> None:
        bench.export(*arguments)
        root: Path = arguments[3]
        (root / "sam2_encoder/1/model.onnx").unlink()

    with pytest.raises(RepositoryError, match=r"1 problems in .* sam2_encoder: 1/model\.onnx is"):
        bench.skipped(export=half)


def test_a_family_that_nobody_publishes(bench: Bench) -> None:
    with pytest.raises(InvalidInputError, match=r"Nobody publishes SAM 2\.1 in ONNX"):
        bench.skipped(road="onnx")


def test_all_goes_on_after_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["setup", "all", "--offline", "--checkpoints", str(tmp_path / "none")]
    assert cli.main([*command, "--repository", str(tmp_path / "repository")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("triton-sam: 3 of 3 were not set up. sam1: Offline, and 1 file is")
    assert all(f" {name}: Offline" in said for name in FAMILIES)
    assert said.count("\n") == 1
    assert cli.main([*command, "--variant", "tiny"]) == 1
    assert "--variant, --from and --default are of one family" in capsys.readouterr().err
