"""The commands, as people type them: what they print, write and refuse."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Exported
from PIL import Image

from triton_sam import SAM2TritonClient, cli
from triton_sam.demo import demo_photo
from triton_sam.server import EmbeddedServer

COMMAND = [sys.executable, "-m", "triton_sam.cli"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    demo_photo().save(path)
    return path


def test_segment_writes_the_mask_of_the_client(
    server: EmbeddedServer, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, mask = tmp_path / "out.png", tmp_path / "mask.png"
    command = ["segment", str(photo), "--url", server.url, "--point", "285,150", "--background"]
    command += ["20,20", "--box", "80,60,410,390", "-o", str(out), "--mask", str(mask)]
    assert cli.main(command) == 0
    with SAM2TritonClient(server.url) as client:
        client.set_image(photo)
        expected = client.segment([[285, 150], [20, 20]], [1, 0], box=[80, 60, 410, 390])
    with Image.open(mask) as written, Image.open(out) as overlay:
        np.testing.assert_array_equal(written, expected.masks[0, 0].astype(np.uint8) * 255)
        assert overlay.size == demo_photo().size
    said = json.loads(capsys.readouterr().out)
    assert said["area"] == expected.area[0, 0]
    assert said["bbox"] == expected.bbox[0, 0].tolist()
    assert said["score"] == pytest.approx(expected.scores[0, 0], abs=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.png", "out.png", "photo.png"]


def _damage(folder: Path) -> dict[str, Path]:
    """Files that are no image in one way or another."""
    text = folder / "text.jpg"
    text.write_text("not an image")
    whole = folder / "whole.jpg"
    demo_photo().save(whole)
    truncated = folder / "truncated.jpg"
    truncated.write_bytes(whole.read_bytes()[:9000])
    huge = folder / "huge.png"
    Image.new("1", (20000, 20000)).save(huge)
    return {"missing": folder / "none.jpg", "text": text, "truncated": truncated, "huge": huge}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "none.jpg"),
        ("text", "text.jpg"),
        ("truncated", "truncated"),
        ("huge", "400000000 pixels"),
    ],
)
def test_segment_of_what_is_no_image(
    fault: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = _damage(tmp_path)[fault]
    # No server either: the image is looked at first.
    assert cli.main(["segment", str(image), "--url", "localhost:1", "--point", "1,1"]) == 1
    _assert_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--point", "nan,20"], "got NaN or infinity"),
        (["--point", "1200,20"], "1200"),
        (["--box", "10,10,5,20"], "10"),
        ([], "Say where the object is: --point X,Y, --box X0,Y0,X1,Y1"),
        (["--point", "285,150", "-o", "no/such/folder/out.png"], ": no/such/folder/out.png"),
    ],
)
def test_segment_with_a_prompt_that_does_not_fit(
    arguments: list[str],
    message: str,
    server: EmbeddedServer,
    photo: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["segment", str(photo), "--url", server.url, *arguments]) == 1
    _assert_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:1", "No Triton server at localhost:1"),
        ("grpc://localhost:1", "No Triton server at localhost:1"),
        ("ftp://localhost", "ftp"),
    ],
)
def test_segment_without_a_server(
    url: str, message: str, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["segment", str(photo), "--url", url, "--point", "1,1"]) == 1
    _assert_one_line(capsys.readouterr().err, message)


def test_segment_with_a_server_that_lacks_a_model(
    exported: Exported, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sam2_encoder").symlink_to(exported.repository / "sam2_encoder")
    with EmbeddedServer(tmp_path) as server:
        command = ["segment", str(photo), "--url", server.url, "--point", "1,1"]
        assert cli.main(command) == 1
    _assert_one_line(capsys.readouterr().err, "'sam2_decoder'. It serves: sam2_encoder.")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["segment", "x.jpg", "--point", "1;2"], "expected X,Y in pixels, not '1;2'"),
        (["segment", "x.jpg", "--box", "1,2,3"], "expected X0,Y0,X1,Y1 in pixels, not '1,2,3'"),
        (["serve", "--http-port", "70000"], "expected a port from 0 to 65535, not '70000'"),
        (["export", "sam9"], "invalid choice: 'sam9'"),
        ([], "required: COMMAND"),
    ],
)
def test_a_wrong_command_line(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 2
    _assert_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["export", "sam2", "--variant", "huge"], "no variant 'huge'; choose one of: tiny"),
        (["export", "sam2", "--checkpoint", "none.pt"], "No checkpoint at none.pt"),
        (["serve", "--repository", "none"], "none"),
        (["check", "--repository", "none"], "No model repository at none"),
    ],
)
def test_commands_say_what_is_missing(
    command: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not any(path.suffix for path in tmp_path.rglob("*"))


def test_check_and_configure(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "--repository", str(exported.repository)]) == 0
    assert cli.main(["configure", "--repository", str(tmp_path)]) == 0
    assert cli.main(["check", "--repository", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "sam2_encoder: 1/model.onnx is missing; run `triton-sam export`." in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_until_a_signal(exported: Exported, number: signal.Signals) -> None:
    command = [*COMMAND, "serve", "--repository", str(exported.repository)]
    command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as it:
        assert it.stdout is not None and it.stderr is not None
        http, grpc = (it.stdout.readline().split()[1] for _ in range(2))
        for url in (http, f"grpc://{grpc}"):
            with SAM2TritonClient(url) as client:
                client.wait_until_ready(10)
        started = time.monotonic()
        it.send_signal(number)
        assert it.wait(20) == 0
        assert time.monotonic() - started < 10
        assert "Traceback" not in it.stderr.read()


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "segment", "serve", "export", "configure", "check"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
        assert f"usage: triton-sam {command}" in capsys.readouterr().out


def _assert_one_line(text: str, message: str) -> None:
    assert text.startswith("triton-sam"), text
    assert text.count("\n") == 1, text
    assert message in text, text
