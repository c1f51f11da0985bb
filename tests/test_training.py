"""The training program learns, resumes where it was cut off, and repeats itself."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triton_sam.export import sam2

ROOT = Path(__file__).parent.parent
PROGRAM = [sys.executable, str(ROOT / "scripts/train_demo_model.py")]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "scenes"
    command = ["scenes", str(folder), "--shards", "2", "--count", "6", "--size", "128"]
    subprocess.run([*PROGRAM, *command], check=True)
    return folder


def _train(folder: Path, scenes: Path, steps: int) -> dict[str, torch.Tensor]:
    command = ["train", str(folder), "--scenes", str(scenes), "--stage", "s", "--size", "128"]
    command += ["--steps", str(steps), "--images", "2", "--prompts", "2", "--workers", "1"]
    subprocess.run([*PROGRAM, *command], check=True)
    return sam2.read_state_dict(folder / "model.pt")


def test_the_same_seed_gives_the_same_model(scenes: Path, tmp_path: Path) -> None:
    first = _train(tmp_path / "first", scenes, 2)
    second = _train(tmp_path / "second", scenes, 2)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert all(torch.equal(value, value.bfloat16().float()) for value in first.values())
    # The official format, loaded strictly by the official builder.
    sam2.build_model("sam2.1_demo.yaml", tmp_path / "first" / "model.pt")


def test_a_second_run_goes_on(scenes: Path, tmp_path: Path) -> None:
    before = _train(tmp_path, scenes, 1)
    after = _train(tmp_path, scenes, 3)
    name = "sam_mask_decoder.mask_tokens.weight"
    assert not torch.equal(before[name], after[name])
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["step"]) == 3
