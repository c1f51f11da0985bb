"""The examples run as they are, on the demo server."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from triton_sam import Segmentation
from triton_sam.demo import demo_photo, demo_repository
from triton_sam.server import EmbeddedServer

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def demo() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(demo_repository()) as server:
        yield server


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False
    )


def test_hover(demo: EmbeddedServer, tmp_path: Path) -> None:
    photo, overlay = tmp_path / "photo.jpg", tmp_path / "overlay.png"
    demo_photo().save(photo)
    done = run(EXAMPLES / "hover.py", photo, "--url", demo.url, "-o", overlay)
    assert (done.returncode, done.stderr) == (0, "")
    with Image.open(overlay) as picture:
        assert picture.size == demo_photo().size
    lines = [line for line in done.stdout.splitlines() if line.startswith("x ")]
    last_x = float(lines[-1].split()[1])
    assert abs(last_x - demo_photo().width * 59.5 / 60) < 0.1
    assert 1 <= len(lines) <= 60 and "queued=60" in done.stdout


def test_batch(demo: EmbeddedServer, tmp_path: Path) -> None:
    source, target = tmp_path / "photos", tmp_path / "masks"
    source.mkdir()
    for number in range(3):
        demo_photo().crop((100 * number, 0, 600 + 100 * number, 500)).save(source / f"{number}.png")
    (source / "broken.jpg").write_bytes(b"no image")
    done = run(EXAMPLES / "batch.py", source, target, "--url", demo.url)
    assert done.returncode == 1 and "broken.jpg" in done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3
    for entry in found:
        with Image.open(entry["mask"]) as mask:
            assert (mask.size, mask.getbbox()) == ((600, 500), tuple(entry["bbox"]))
    again = run(EXAMPLES / "batch.py", source, target, "--url", demo.url)
    assert again.stdout == ""  # all is done already


def test_the_notebook(
    demo: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_URL", demo.url)
    monkeypatch.chdir(tmp_path)
    shown = list(asyncio.run(execute(EXAMPLES / "quickstart.ipynb")))
    assert [type(value) for value in shown if value is not None] == [
        Segmentation,
        *[Image.Image] * 3,
    ]
    assert os.environ["TRITON_URL"] == demo.url


async def execute(notebook: Path) -> list[Any]:
    """Run the code cells one after the other, ``await`` included; the value of each."""
    content = json.loads(notebook.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    names: dict[str, Any] = {}
    shown = []
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            shown.append(await evaluate("".join(cell["source"]), names))
    return shown


async def evaluate(source: str, names: dict[str, Any]) -> Any:
    """What a notebook makes of a cell: the value of its last line."""
    tree = ast.parse(source)
    if isinstance(tree.body[-1], ast.Expr):
        tree.body[-1] = ast.Assign([ast.Name("_shown", ast.Store())], tree.body[-1].value)
        ast.fix_missing_locations(tree)
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    names["_shown"] = None
    result = eval(compile(tree, "cell", "exec", flags), names)
    if inspect.isawaitable(result):
        await result
    return names["_shown"]
