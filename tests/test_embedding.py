"""Embeddings as files: what is written is read, and nothing else is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from embeddings import assert_equal, embedding
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from triton_sam.embedding import Embedding, EmbeddingKey
from triton_sam.errors import EmbeddingError

STORED = embedding().to_bytes()


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "photo.safetensors"
    embedding().save(path)
    loaded = Embedding.load(path)
    assert_equal(loaded, embedding())
    assert loaded.nbytes == embedding().nbytes == 4 * 3 * 16 * 16
    assert [file.name for file in tmp_path.iterdir()] == ["photo.safetensors"]


def test_threads_save_to_the_same_path(tmp_path: Path) -> None:
    path, want = tmp_path / "photo.safetensors", embedding(side=128)
    with ThreadPoolExecutor(8) as pool:
        for saved in [pool.submit(want.save, path) for _ in range(100)]:
            saved.result()
    assert_equal(Embedding.load(path), want)
    assert [file.name for file in tmp_path.iterdir()] == ["photo.safetensors"]


def test_the_file_is_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "photo.safetensors"
    embedding().save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        tensor = file.get_tensor("image_embeddings")
    np.testing.assert_array_equal(tensor, embedding().tensors["image_embeddings"])
    assert metadata["original_size"] == "[30, 40]"
    assert (metadata["family"], metadata["variant"]) == ("sam2", "tiny")
    assert (metadata["digest"], metadata["model_version"]) == ("digest0", "1")


def test_float16_halves_the_file() -> None:
    half = embedding(side=64).to_bytes(float16=True)
    assert len(half) < 0.52 * len(embedding(side=64).to_bytes())
    assert_equal(Embedding.from_bytes(half), embedding(side=64), tolerance=1e-3)


def test_float16_keeps_large_values_finite() -> None:
    large = Embedding({"x": np.array([1e6, -1e6, 1.0], np.float32)}, (1, 1), "d", "sam2")
    restored = Embedding.from_bytes(large.to_bytes(float16=True))
    np.testing.assert_array_equal(restored.tensors["x"], [65504, -65504, 1])


def test_loaded_arrays_are_read_only() -> None:
    for float16 in (False, True):
        loaded = Embedding.from_bytes(embedding().to_bytes(float16=float16))
        with pytest.raises(ValueError, match="read-only"):
            loaded.tensors["image_embeddings"][...] = 0


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.lists(st.integers(0, 3), max_size=4),
        max_size=4,
    ),
    st.text(max_size=8),
    st.tuples(st.integers(1, 9999), st.integers(1, 9999)),
)
def test_any_embedding_survives(
    shapes: dict[str, list[int]], text: str, size: tuple[int, int]
) -> None:
    tensors = {name: np.full(shape, len(name), np.float32) for name, shape in shapes.items()}
    want = Embedding(tensors, size, text, text, text, text)
    assert_equal(Embedding.from_bytes(want.to_bytes()), want)


@given(st.integers(0, len(STORED) - 1), st.integers(1, 255))
def test_one_wrong_byte_is_noticed(position: int, change: int) -> None:
    damaged = bytearray(STORED)
    damaged[position] ^= change
    with pytest.raises(EmbeddingError):
        Embedding.from_bytes(bytes(damaged))


@given(st.integers(0, len(STORED) - 1))
def test_a_truncated_one_is_noticed(length: int) -> None:
    with pytest.raises(EmbeddingError):
        Embedding.from_bytes(STORED[:length])


@given(st.binary(max_size=200))
def test_noise_is_no_embedding(content: bytes) -> None:
    with pytest.raises(EmbeddingError, match="not an embedding"):
        Embedding.from_bytes(content)


def test_what_the_errors_say(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": np.zeros(3)}, path, {"made": "elsewhere"})
    with pytest.raises(EmbeddingError, match=r"other.safetensors' is a .* but not an embedding"):
        Embedding.load(path)
    path.write_bytes(STORED.replace(b'"format_version":"1"', b'"format_version":"9"'))
    with pytest.raises(EmbeddingError, match="format version 9; this triton-sam reads 1"):
        Embedding.load(path)
    path.write_bytes(STORED[:-1] + bytes([STORED[-1] ^ 1]))
    with pytest.raises(EmbeddingError, match=r"checksum does not match\. Encode the image again"):
        Embedding.load(path)
    with pytest.raises(FileNotFoundError):
        Embedding.load(tmp_path / "missing")


def test_keys_differ_in_every_field() -> None:
    fields = [("a", "b", "c", "d"), ("x", "b", "c", "d"), ("a", "x", "c", "d")]
    fields += [
        ("a", "b", "x", "d"),
        ("a", "b", "c", "x"),
        ("ab", "", "c", "d"),
        ("a", "bc", "", "d"),
    ]
    names = {EmbeddingKey(*values).name for values in fields}
    assert len(names) == len(fields)
    assert all(len(name) == 40 and name.isalnum() for name in names)
