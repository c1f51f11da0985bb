"""Downloads from a server that truncates, stalls, refuses, lies or dies."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakehost import Answer, Host, Request, hosted

from triton_sam import cli
from triton_sam.downloads import Patience, RemoteFile, Store, sha256_of
from triton_sam.downloads.meta import meta_file
from triton_sam.downloads.notes import note_path
from triton_sam.downloads.transfer import Interrupted, retrying
from triton_sam.errors import (
    ChecksumError,
    DiskSpaceError,
    DownloadError,
    OfflineError,
)
from triton_sam.specs import FAMILIES

CONTENT = bytes(range(256)) * 4000  # 1 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
IMPATIENT = Patience(connect_s=5, stall_s=1, attempts=3, first_wait_s=0.01, longest_wait_s=0.05)
STORE = Store(patience=IMPATIENT)


def _remote(url: str, folder: Path, digest: str | None = SHA256) -> RemoteFile:
    return RemoteFile(folder / "model.pt", f"{url}/model.pt", "origin", len(CONTENT), digest)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def _whole(request: Request) -> None:
    request.serve(CONTENT)


def _assert_right(folder: Path) -> None:
    assert (folder / "model.pt").read_bytes() == CONTENT
    assert _names(folder) == ["model.pt", "model.pt.sha256"]
    subprocess.run(["sha256sum", "--check", "--strict", "model.pt.sha256"], cwd=folder, check=True)


def test_a_download_is_whole_checked_and_not_repeated(tmp_path: Path) -> None:
    with hosted(_whole) as host:
        remote = _remote(host.url, tmp_path)
        assert STORE.ensure([remote]) == [tmp_path / "model.pt"]
        _assert_right(tmp_path)
        assert STORE.ensure([remote]) == []
        assert len(host.seen) == 1
        assert Store(patience=IMPATIENT, force=True).ensure([remote]) == [tmp_path / "model.pt"]
        assert len(host.seen) == 2
    _assert_right(tmp_path)


def test_a_file_that_is_right_without_a_note_is_kept(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(CONTENT)
    with hosted(_whole) as host:
        assert STORE.ensure([_remote(host.url, tmp_path)]) == []
        assert host.seen == []
    _assert_right(tmp_path)


def test_a_file_that_was_changed_is_replaced(tmp_path: Path) -> None:
    with hosted(_whole) as host:
        remote = _remote(host.url, tmp_path)
        STORE.ensure([remote])
        (tmp_path / "model.pt").write_bytes(CONTENT[::-1])
        assert STORE.ensure([remote]) == [tmp_path / "model.pt"]
    _assert_right(tmp_path)


def test_a_hash_is_read_from_the_note_while_the_file_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"one")
    assert sha256_of(path) == hashlib.sha256(b"one").hexdigest()
    note_path(path).write_text(note_path(path).read_text().replace(sha256_of(path), "f" * 64))
    assert sha256_of(path) == "f" * 64
    path.write_bytes(b"two more")
    assert sha256_of(path) == hashlib.sha256(b"two more").hexdigest()


def test_a_cut_connection_is_resumed_where_it_ended(tmp_path: Path) -> None:
    with hosted(lambda request: request.serve(CONTENT, upto=request.first_byte + 400_000)) as host:
        STORE.ensure([_remote(host.url, tmp_path)])
        asked = [(headers.get("Range"), headers.get("If-Range")) for _, _, headers in host.seen]
    etag = f'"{hashlib.md5(CONTENT).hexdigest()}"'
    assert asked == [(None, None), ("bytes=400000-", etag), ("bytes=800000-", etag)]
    _assert_right(tmp_path)


def test_a_second_run_goes_on_where_the_first_one_stopped(tmp_path: Path) -> None:
    kept = "300000 bytes are kept; run the command again"
    with (
        hosted(lambda request: request.serve(CONTENT, upto=300_000)) as host,
        pytest.raises(DownloadError, match=kept),
    ):
        STORE.ensure([_remote(host.url, tmp_path)])
    assert (tmp_path / "model.pt.part").read_bytes() == CONTENT[:300_000]
    assert not (tmp_path / "model.pt").exists()
    with hosted(_whole) as host:
        STORE.ensure([_remote(host.url, tmp_path)])
        assert [headers.get("Range") for _, _, headers in host.seen] == ["bytes=300000-"]
    _assert_right(tmp_path)


def test_a_file_that_changed_on_the_server_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "model.pt.part").write_bytes(b"older" * 1000)
    (tmp_path / "model.pt.part.etag").write_text('"of the older file"')
    with hosted(_whole) as host:
        STORE.ensure([_remote(host.url, tmp_path)])
        assert len(host.seen) == 1
    _assert_right(tmp_path)


def test_a_part_of_another_file_is_found_out_by_the_hash(tmp_path: Path) -> None:
    (tmp_path / "model.pt.part").write_bytes(b"other" * 1000)
    with hosted(_whole) as host:
        STORE.ensure([_remote(host.url, tmp_path)])
        assert [headers.get("Range") for _, _, headers in host.seen] == ["bytes=5000-", None]
    _assert_right(tmp_path)


def test_a_server_without_ranges_is_read_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "model.pt.part").write_bytes(CONTENT[:5000])
    with hosted(lambda request: request.status(200, CONTENT)) as host:
        STORE.ensure([_remote(host.url, tmp_path)])
    _assert_right(tmp_path)


def _stall_once(request: Request) -> None:
    if request.first_byte:
        request.serve(CONTENT)
    else:
        request.serve(CONTENT, upto=100_000, stall_s=2.5)


def _die_half_way(request: Request) -> None:
    if request.first_byte:
        request.serve(CONTENT)
    else:
        request.serve(CONTENT, upto=500_000)
        request.connection.close()


def _busy_at_first(request: Request) -> None:
    if len(request.host.seen) < 3:
        request.status(503, Retry_After="0")
    else:
        request.serve(CONTENT)


def _too_much_asked(request: Request) -> None:
    if request.first_byte:
        request.status(416, Content_Range=f"bytes */{len(CONTENT)}")
    else:
        request.serve(CONTENT)


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (_stall_once, b""),
        (_die_half_way, b""),
        (_busy_at_first, b""),
        (_too_much_asked, b"too long" * 200_000),
    ],
)
def test_what_passes_is_waited_for(answer: Answer, part: bytes, tmp_path: Path) -> None:
    if part:
        (tmp_path / "model.pt.part").write_bytes(part)
    with hosted(answer) as host:
        STORE.ensure([_remote(host.url, tmp_path)])
    _assert_right(tmp_path)


def _wrong_byte(request: Request) -> None:
    request.serve(CONTENT[:-1] + b"!")


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda r: r.status(403), DownloadError, "the server answered 403"),
        (lambda r: r.status(404), DownloadError, "the server answered 404"),
        (lambda r: r.status(416), DownloadError, "(416), 3 times in a row"),
        (lambda r: r.status(500), DownloadError, "answered 500, 3 times in a row"),
        (lambda r: r.serve(CONTENT, 0, 2.5), DownloadError, "the server stopped sending, 3 times"),
        (lambda r: r.connection.close(), DownloadError, "3 times in a row"),
        (lambda r: r.status(200, b"<html>Sign in</html>"), ChecksumError, "has 20 bytes and not"),
        (_wrong_byte, ChecksumError, f"and not {SHA256}. It was thrown away"),
    ],
    ids=["403", "404", "416", "500", "stalls", "dies", "login page", "wrong byte"],
)
def test_what_does_not_pass_leaves_all_as_it_was(
    answer: Answer, error: type[DownloadError], message: str, tmp_path: Path
) -> None:
    (tmp_path / "model.pt").write_bytes(b"mine")
    with hosted(answer) as host:
        with pytest.raises(error) as raised:
            STORE.ensure([_remote(host.url, tmp_path)])
        assert f"{host.url}/model.pt" in str(raised.value)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert (tmp_path / "model.pt").read_bytes() == b"mine"
    assert _names(tmp_path) == ["model.pt"]


def test_nobody_answers(tmp_path: Path) -> None:
    with hosted(_whole) as host:
        pass
    with pytest.raises(DownloadError, match=r"could not be fetched: .*refused, 3 times in a row"):
        STORE.ensure([_remote(host.url, tmp_path)])


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


def test_a_proxy_is_asked(no_proxies: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with hosted(_whole) as proxy:
        no_proxies.setenv("HTTP_PROXY", proxy.url)
        STORE.ensure([_remote("http://files.invalid", tmp_path)])
        assert [path for _, path, _ in proxy.seen] == ["http://files.invalid/model.pt"]
    _assert_right(tmp_path)


@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        ("socks5://127.0.0.1:1080", "a SOCKS proxy, which needs a package: pip install socksio"),
        ("ftp://proxy", "cannot be used: Unknown scheme for proxy URL .* Check HTTPS_PROXY"),
    ],
)
def test_a_proxy_that_cannot_be_used(
    proxy: str, message: str, no_proxies: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_proxies.setitem(sys.modules, "socksio", None)
    no_proxies.setenv("ALL_PROXY", proxy)
    with hosted(_whole) as host:
        with pytest.raises(DownloadError, match=message):
            STORE.ensure([_remote(host.url, tmp_path)])
        assert host.seen == []
    assert _names(tmp_path) == []


def test_a_mirror_that_is_no_address(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"is not an address: .* Check TRITON_SAM_MIRROR"):
        STORE.ensure([_remote("mirror.example/files", tmp_path)])


def test_waits_grow_and_the_server_may_ask_for_longer() -> None:
    def waits(asked_s: float) -> list[float]:
        waited: list[float] = []
        again = retrying(Patience(first_wait_s=1, longest_wait_s=8, attempts=6))
        again.sleep = waited.append

        def fail() -> None:
            raise Interrupted("busy", asked_s)

        with pytest.raises(Interrupted):
            again(fail)
        return waited

    # Up to a second of jitter comes on top.
    for asked_s, expected in ((0, [1, 2, 4, 8, 8]), (3, [3, 3, 4, 8, 8]), (99, [8] * 5)):
        for waited, least in zip(waits(asked_s), expected, strict=True):
            assert least <= waited <= least + 1


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    store = Store(patience=IMPATIENT, free_space=lambda _: 700_000)
    message = r"model.pt needs 51 MB and .* has 700 kB free\. .* --checkpoints of `setup`"
    with hosted(_whole) as host:
        with pytest.raises(DiskSpaceError, match=message):
            store.ensure([_remote(host.url, tmp_path)])
        assert host.seen == []


def test_a_disk_that_fills_up_keeps_what_came(tmp_path: Path) -> None:
    # /dev/full takes no byte; what the error says must still name the folder.
    (tmp_path / "model.pt.part").symlink_to("/dev/full")
    with hosted(_whole) as host, pytest.raises(DiskSpaceError, match=r"The disk is full"):
        STORE.ensure([_remote(host.url, tmp_path)])


def test_offline_says_what_is_missing_and_where_to_put_it(tmp_path: Path) -> None:
    offline = Store(offline=True)
    with hosted(_whole) as host:
        remote = _remote(host.url, tmp_path / "checkpoints")
        with pytest.raises(OfflineError) as raised:
            offline.ensure([remote])
        assert str(raised.value) == (
            f"Offline, and 1 file is missing: model.pt (1 MB) from {host.url}/model.pt, to be put "
            f"at {tmp_path}/checkpoints/model.pt."
        )
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/model.pt").write_bytes(CONTENT)
        assert offline.ensure([remote]) == []
        assert host.seen == []


def test_two_threads_fetch_once(tmp_path: Path) -> None:
    def slowly(request: Request) -> None:
        time.sleep(0.15)
        request.serve(CONTENT)

    with hosted(slowly) as host:
        remote = _remote(host.url, tmp_path)
        threads = [threading.Thread(target=STORE.ensure, args=([remote],)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(host.seen) == 1
    _assert_right(tmp_path)


_CHILD = """
import sys
from pathlib import Path
from triton_sam.downloads import RemoteFile, Store
remote = RemoteFile(Path(sys.argv[2]), sys.argv[1], "origin", {size}, "{sha256}")
print(len(Store().ensure([remote])))
"""


def test_two_processes_fetch_once(tmp_path: Path) -> None:
    def slowly(request: Request) -> None:
        time.sleep(0.5)
        request.serve(CONTENT)

    with hosted(slowly) as host:
        code = _CHILD.format(size=len(CONTENT), sha256=SHA256)
        command = [sys.executable, "-c", code, f"{host.url}/model.pt", str(tmp_path / "model.pt")]
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for _ in range(2)
        ]
        said = sorted(process.communicate()[0].strip() for process in running)
        assert len(host.seen) == 1
    assert said == ["0", "1"]
    _assert_right(tmp_path)


def test_a_killed_process_leaves_a_part_that_the_next_one_completes(tmp_path: Path) -> None:
    def first(request: Request) -> None:
        request.serve(CONTENT, upto=600_000, stall_s=5)

    with hosted(first) as host:
        code = _CHILD.format(size=len(CONTENT), sha256=SHA256)
        command = [sys.executable, "-c", code, f"{host.url}/model.pt", str(tmp_path / "model.pt")]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            part = tmp_path / "model.pt.part"
            while not (part.exists() and part.stat().st_size >= 500_000):
                assert process.poll() is None
                time.sleep(0.02)
            process.kill()
        host.answer = _whole
        STORE.ensure([_remote(host.url, tmp_path)])
        assert int(host.seen[-1][2]["Range"].removeprefix("bytes=").rstrip("-")) >= 500_000
    _assert_right(tmp_path)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A mirror that has :data:`CONTENT` for every file."""
    with hosted(_whole) as host:
        monkeypatch.setenv("TRITON_SAM_MIRROR", f"{host.url}/meta/")
        yield host


def test_the_mirror_takes_the_place_of_metas_address(
    mirror: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # What the mirror has is not Meta's file: the table's size is held against it.
    assert cli.main(["download", "sam2", "--output", str(tmp_path)]) == 1
    assert [path for _, path, _ in mirror.seen] == [
        "/meta/segment_anything_2/092824/sam2.1_hiera_tiny.pt"
    ]
    said = capsys.readouterr().err
    assert "has 1024000 bytes and not 156008466" in said
    assert said.count("\n") == 1
    assert _names(tmp_path) == []


def test_a_note_names_the_file_whatever_the_mirror(mirror: Host, tmp_path: Path) -> None:
    variant = replace(FAMILIES["sam2"].variant("tiny"), nbytes=len(CONTENT), sha256=SHA256)
    files = [meta_file(variant, tmp_path)]
    assert STORE.ensure(files) == [tmp_path / "sam2.1_hiera_tiny.pt"]
    assert "092824/sam2.1_hiera_tiny.pt\n" in note_path(files[0].target).read_text()
    assert "127.0.0.1" not in note_path(files[0].target).read_text()


@pytest.mark.parametrize("variable", [None, "TRITON_SAM_OFFLINE", "HF_HUB_OFFLINE"])
def test_the_command_offline(
    variable: str | None,
    mirror: Host,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["download", "sam2", "--variant", "large", "--output", str(tmp_path)]
    if variable:
        monkeypatch.setenv(variable, "1")
    else:
        command.append("--offline")
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert f"898 MB) from {mirror.url}/meta/" in said
    assert f"to be put at {tmp_path}/sam2.1_hiera_large.pt" in said
    assert mirror.seen == []


def test_the_demo_model_is_not_downloaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download", "sam2", "--variant", "demo"]) == 1
    assert "choose one of: tiny, small, base_plus, large" in capsys.readouterr().err
