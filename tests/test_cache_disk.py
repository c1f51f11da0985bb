"""The cache on disk: shared by processes, killed, damaged, full."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from embeddings import assert_equal, embedding

from triton_sam.cache import DiskTier, EmbeddingCache, MemoryTier
from triton_sam.cache.tiers import GuardedTier

STORED = len(embedding().to_bytes())

# Writes and reads entries that others write, read and evict too, and checks all it reads.
WORKER = """
import sys
from embeddings import assert_equal, embedding
from triton_sam.cache import DiskTier
folder, budget, rounds, start = sys.argv[1], *map(int, sys.argv[2:])
disk = DiskTier(folder, budget)
hits = 0
print("ready", flush=True)
for i in range(start, start + rounds):
    disk.put(embedding(i % 8))
    for seed in range(8):
        found = disk.get(embedding(seed).key)
        if found is not None:
            assert_equal(found, embedding(seed))
            hits += 1
assert disk.stats().damaged == 0
print(hits)
"""


def worker(folder: Path, budget: int, rounds: int, start: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", WORKER, *map(str, (folder, budget, rounds, start))]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_what_was_stored_is_found_by_another_program(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert DiskTier(folder).put(embedding())
    assert_equal(DiskTier(str(folder)).get(embedding().key), embedding())
    assert DiskTier(folder).get(embedding(1).key) is None


def test_a_folder_that_is_missing_is_an_empty_cache(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path / "missing")
    assert disk.get(embedding().key) is None
    disk.clear()
    assert (disk.stats().entries, disk.stats().nbytes) == (0, 0)


def test_float16(tmp_path: Path) -> None:
    DiskTier(tmp_path, float16=True).put(embedding(side=64))
    assert_equal(DiskTier(tmp_path).get(embedding().key), embedding(side=64), tolerance=1e-3)
    assert only_file(tmp_path).stat().st_size < 0.52 * len(embedding(side=64).to_bytes())


def test_the_one_used_longest_ago_makes_room(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, max_bytes=3 * STORED)
    for seed in range(3):
        disk.put(embedding(seed))
        path = tmp_path / f"{embedding(seed).key.name}.safetensors"
        os.utime(path, (1000 + seed, 1000 + seed))
    assert disk.get(embedding(0).key) is not None
    disk.put(embedding(3))
    assert disk.get(embedding(1).key) is None
    for seed in (0, 2, 3):
        assert_equal(disk.get(embedding(seed).key), embedding(seed))
    stats = disk.stats()
    assert (stats.evictions, stats.entries, stats.nbytes) == (1, 3, 3 * STORED)


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    others = [tmp_path / "model.safetensors", tmp_path / "photo.safetensors"]
    for other in others:
        other.write_bytes(bytes(5 * STORED))
        os.utime(other, (1000, 1000))
    disk = DiskTier(tmp_path, max_bytes=2 * STORED)
    for seed in range(3):
        assert disk.put(embedding(seed))
    assert (disk.stats().entries, disk.stats().nbytes) == (2, 2 * STORED)
    disk.clear()
    assert sorted(tmp_path.iterdir()) == others


def test_filled_past_its_budget(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, max_bytes=4 * STORED + 10)
    for seed in range(12):
        disk.put(embedding(seed))
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 4 * STORED + 10
    assert disk.stats().evictions == 8
    assert not disk.put(embedding(0, side=64))
    assert disk.stats().entries == 4


@pytest.mark.parametrize("keep", [0, 7, 300, STORED - 1], ids=lambda n: f"{n} bytes left")
def test_a_truncated_entry_is_a_miss(
    tmp_path: Path, keep: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache = EmbeddingCache(DiskTier(tmp_path))
    cache.put(embedding())
    with only_file(tmp_path).open("r+b") as file:
        file.truncate(keep)
    assert_equal(cache.get_or_encode(embedding().key, embedding), embedding())
    assert "dropped a damaged entry of the disk cache" in caplog.text
    assert_equal(cache.get(embedding().key), embedding())
    disk = cache.stats().tiers[0]
    assert (disk.damaged, disk.errors, disk.misses, disk.hits) == (1, 0, 1, 1)


@pytest.mark.parametrize("position", [0, 30, STORED // 2, STORED - 1])
def test_a_corrupted_entry_is_a_miss(tmp_path: Path, position: int) -> None:
    disk = DiskTier(tmp_path)
    disk.put(embedding())
    content = bytearray(only_file(tmp_path).read_bytes())
    content[position] ^= 0x40
    only_file(tmp_path).write_bytes(content)
    assert disk.get(embedding().key) is None
    assert list(tmp_path.iterdir()) == []


def test_an_entry_under_the_wrong_name_is_a_miss(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path)
    disk.put(embedding(0))
    only_file(tmp_path).rename(tmp_path / f"{embedding(1).key.name}.safetensors")
    assert disk.get(embedding(1).key) is None


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    budget = 5 * STORED
    workers = [worker(tmp_path, budget, 60, start) for start in (0, 4)]
    outputs = [process.communicate(timeout=60)[0] for process in workers]
    assert [process.returncode for process in workers] == [0, 0]
    assert all(int(output.split()[-1]) > 60 for output in outputs)
    stats = DiskTier(tmp_path, budget).stats()
    assert stats.nbytes is not None and 0 < stats.nbytes <= budget
    assert all(file.suffix == ".safetensors" for file in tmp_path.iterdir())


def test_a_killed_process_leaves_nothing_broken(tmp_path: Path) -> None:
    process = worker(tmp_path, 100 * STORED, 100_000, 0)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    while sum(1 for _ in tmp_path.glob("*.safetensors")) < 8:
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=30)
    unfinished = tmp_path / ".writing-0123"  # as a kill inside a write leaves one
    unfinished.write_bytes(embedding().to_bytes()[:1000])
    disk = DiskTier(tmp_path)
    for seed in range(8):
        assert_equal(disk.get(embedding(seed).key), embedding(seed))
    assert disk.stats().entries == 8
    assert unfinished.exists()  # it could be another process's, which still writes
    os.utime(unfinished, (1000, 1000))
    disk.put(embedding())
    assert not unfinished.exists()


class FullDisk:
    """A disk of ``capacity`` bytes: what goes beyond is cut off, and said so."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def __call__(self, path: Path, content: bytes) -> None:
        used = sum(file.stat().st_size for file in path.parent.iterdir())
        path.write_bytes(content[: max(0, self.capacity - used)])
        if used + len(content) > self.capacity:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_older_entries_make_room_on_a_disk_smaller_than_the_budget(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, write=FullDisk(3 * STORED + 100))
    for seed in range(6):
        assert disk.put(embedding(seed))
        assert_equal(disk.get(embedding(seed).key), embedding(seed))
    assert disk.stats().evictions == 4
    assert disk.stats().entries == 2


def test_a_disk_that_others_filled_is_a_logged_miss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FullDisk(2 * STORED)
    cache = EmbeddingCache(DiskTier(tmp_path, write=disk))
    cache.put(embedding(0))
    disk.capacity = 0
    for _ in range(3):
        assert_equal(cache.get_or_encode(embedding(1).key, lambda: embedding(1)), embedding(1))
    assert caplog.text.count("cannot write the disk cache") == 1
    assert "No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert cache.stats().tiers[0].errors == 1


def test_a_file_size_limit_of_the_system(tmp_path: Path) -> None:
    code = f"""
import resource
from embeddings import embedding
from triton_sam.cache import DiskTier, EmbeddingCache
resource.setrlimit(resource.RLIMIT_FSIZE, ({STORED // 2}, {STORED // 2}))
cache = EmbeddingCache(DiskTier({str(tmp_path)!r}))
for _ in range(2):
    found = cache.get_or_encode(embedding().key, embedding)
    assert found.digest == "digest0"
stats = cache.stats()
assert (stats.encoded, stats.tiers[0].errors, stats.tiers[0].entries) == (2, 1, 0), stats
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot write the disk cache, left out for 30 s" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_never_fatal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = EmbeddingCache(MemoryTier(), DiskTier(tmp_path / "file"))
    assert_equal(cache.get_or_encode(embedding().key, embedding), embedding())
    assert_equal(cache.get(embedding().key), embedding())
    cache.clear()
    assert cache.stats().tiers[1].errors >= 2
    assert caplog.records[0].levelno == logging.WARNING


def test_a_folder_is_made_by_the_first_entry(tmp_path: Path) -> None:
    guarded = GuardedTier(DiskTier(tmp_path / "later"))
    assert guarded.get(embedding().key) is None
    guarded.put(embedding())
    assert_equal(guarded.get(embedding().key), embedding())
    assert (guarded.stats().hits, guarded.stats().stored) == (1, 1)
