"""Downloads from the hub: gated and public repositories, held against what the hub declares."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakehost import Host, Request, hosted
from fakehub import FILES, PUBLIC, answer

from triton_sam.downloads import Patience, Store, checkpoint_files, published_files, sha256_of
from triton_sam.errors import (
    ChecksumError,
    DownloadError,
    GatedModelError,
    InvalidInputError,
    OfflineError,
)
from triton_sam.repository import describe_checkpoint
from triton_sam.specs import FAMILIES

IMPATIENT = Patience(connect_s=5, stall_s=5, attempts=2, first_wait_s=0.01, longest_wait_s=0.02)
STORE = Store(patience=IMPATIENT)
GATED = FAMILIES["sam3"]
assert GATED.published is not None
PAIR = GATED.published


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    # huggingface_hub would also find the token of whoever runs the tests.
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRITON_SAM_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with hosted(answer) as host:
        monkeypatch.setenv("HF_ENDPOINT", host.url)
        yield host


@pytest.mark.parametrize(
    ("token", "parts"),
    [
        (None, ["no token was sent", "huggingface.co/facebook/sam3", "HF_TOKEN", "hf-login"]),
        ("expired", ["does not accept your token", "huggingface.co/settings/tokens", "HF_TOKEN"]),
        ("stranger", ["(403)", "Accept the licence on https://huggingface.co/facebook/sam3"]),
    ],
)
def test_a_gated_repository_says_what_to_do(
    token: str | None,
    parts: list[str],
    hub: Host,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(GatedModelError) as raised:
        STORE.ensure(checkpoint_files(GATED, None, tmp_path, IMPATIENT))
    assert all(part in str(raised.value) for part in parts), raised.value
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "sam3").glob("[!.]*")) == []


def test_a_gated_checkpoint_with_an_accepted_licence(
    hub: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "good")
    files = checkpoint_files(GATED, None, tmp_path, IMPATIENT)
    assert STORE.ensure(files) == [
        tmp_path / "sam3/config.json",
        tmp_path / "sam3/model.safetensors",
    ]
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "sam3" / name).read_bytes() == FILES[f"facebook/sam3/{name}"]
    # What the download keeps beside the files is not part of the checkpoint.
    lines = "".join(
        f"{hashlib.sha256(FILES[f'facebook/sam3/{name}']).hexdigest()}  {name}\n"
        for name in ("config.json", "model.safetensors")
    )
    for digest in (None, sha256_of):
        described = describe_checkpoint(tmp_path / "sam3", digest)
        assert described["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    asked = len(hub.seen)
    monkeypatch.delenv("HF_TOKEN")
    assert STORE.ensure(files) == []
    assert len(hub.seen) == asked


@pytest.mark.parametrize(("precision", "suffix"), [(None, ""), ("fp16", "_fp16"), ("q4", "_q4")])
def test_the_published_pair_comes_with_its_data_files(
    precision: str | None, suffix: str, hub: Host, tmp_path: Path
) -> None:
    files = published_files(PAIR, precision, tmp_path, patience=IMPATIENT)
    fetched = STORE.ensure(files)
    expected = {
        path.removeprefix(PUBLIC + "/"): content
        for path, content in FILES.items()
        if path.startswith(
            (
                f"{PUBLIC}/onnx/vision_encoder{suffix}.onnx",
                f"{PUBLIC}/onnx/prompt_encoder_mask_decoder{suffix}.onnx",
            )
        )
    }
    folder = tmp_path / "sam3-tracker-onnx"
    assert {str(path.relative_to(folder)) for path in fetched} == set(expected)
    for name, content in expected.items():
        assert not (folder / name).is_symlink()
        assert (folder / name).read_bytes() == content
    asked = len(hub.seen)
    again = published_files(PAIR, precision, tmp_path, patience=IMPATIENT)
    assert STORE.ensure(again) == []
    assert len(hub.seen) == asked
    assert Store(offline=True).ensure(again) == []


def test_a_pair_that_was_copied_is_used_offline(hub: Host, tmp_path: Path) -> None:
    STORE.ensure(published_files(PAIR, "fp16", tmp_path / "there", patience=IMPATIENT))
    folder = tmp_path / "here/sam3-tracker-onnx/onnx"
    folder.mkdir(parents=True)
    for path in (tmp_path / "there/sam3-tracker-onnx/onnx").glob("*.onnx*"):
        if not path.name.endswith(".sha256"):
            (folder / path.name).write_bytes(path.read_bytes())
    asked = len(hub.seen)
    files = published_files(PAIR, "fp16", tmp_path / "here", offline=True)
    assert [file.target.name for file in files] == [
        "vision_encoder_fp16.onnx",
        "vision_encoder_fp16.onnx_data",
        "prompt_encoder_mask_decoder_fp16.onnx",
    ]
    assert Store(offline=True).ensure(files) == []
    assert len(hub.seen) == asked
    # With a network again, the hub's hashes are asked for, and nothing has to be fetched.
    assert STORE.ensure(published_files(PAIR, "fp16", tmp_path / "here", patience=IMPATIENT)) == []
    assert {method for method, path, _ in hub.seen[asked:] if "/resolve/" in path} == {"HEAD"}


def test_a_precision_that_is_not_there(hub: Host, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="has no 'fp8'; choose one of: fp32, fp16"):
        published_files(PAIR, "fp8", tmp_path, patience=IMPATIENT)
    with pytest.raises(InvalidInputError, match=r"does not hold onnx/vision_encoder_bnb4\.onnx"):
        published_files(PAIR, "bnb4", tmp_path, patience=IMPATIENT)
    assert list(tmp_path.iterdir()) == []


def test_offline_without_the_pair(tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match=r"huggingface\.co/onnx-community/sam3-tracker-ONNX"):
        published_files(PAIR, None, tmp_path, offline=True)
    files = checkpoint_files(GATED, None, tmp_path)
    with pytest.raises(OfflineError, match=rf"2 files are missing: config\.json from .*{tmp_path}"):
        Store(offline=True).ensure(files)


def test_a_file_that_is_not_what_the_hub_declared(hub: Host, tmp_path: Path) -> None:
    def lie(request: Request) -> None:
        if request.command == "GET" and "/resolve/" in request.path:
            request.serve(FILES[f"{PUBLIC}/onnx/vision_encoder.onnx"][:-1] + b"!")
        else:
            answer(request)

    hub.answer = lie
    with pytest.raises(ChecksumError, match="its hash is"):
        STORE.ensure(published_files(PAIR, None, tmp_path, patience=IMPATIENT))
    assert list((tmp_path / "sam3-tracker-onnx/onnx").glob("[!.]*")) == []


def test_a_hub_that_fails(hub: Host, tmp_path: Path) -> None:
    hub.answer = lambda request: request.status(404)
    with pytest.raises(DownloadError, match="the hub answered 404") as raised:
        published_files(PAIR, None, tmp_path, patience=IMPATIENT)
    assert "HF_ENDPOINT" in str(raised.value)
    assert "\n" not in str(raised.value)
    hub.answer = lambda request: request.status(500)
    with pytest.raises(DownloadError, match=r"could not be asked .* the hub answered 500"):
        STORE.ensure(checkpoint_files(GATED, None, tmp_path, IMPATIENT))
    assert len(hub.seen) == 1 + IMPATIENT.attempts


def test_a_hub_that_cannot_be_asked(
    hub: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    for ask in (
        lambda: published_files(PAIR, None, tmp_path, patience=IMPATIENT),
        lambda: STORE.ensure(checkpoint_files(GATED, None, tmp_path, IMPATIENT)),
    ):
        with pytest.raises(DownloadError, match=r"HF_ENDPOINT is 'hub\.example', and not"):
            ask()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("ALL_PROXY", "ftp://proxy")
    for ask in (
        lambda: published_files(PAIR, None, tmp_path, patience=IMPATIENT),
        lambda: STORE.ensure(checkpoint_files(GATED, None, tmp_path, IMPATIENT)),
    ):
        with pytest.raises(DownloadError, match=r"names a proxy that cannot be used"):
            ask()
    assert hub.seen == []
