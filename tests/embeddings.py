"""Small embeddings for the tests of files and caches."""

from __future__ import annotations

import numpy as np

from triton_sam.embedding import Embedding


def embedding(seed: int = 0, *, side: int = 16, version: str = "1") -> Embedding:
    """Random tensors of 4 * 3 * side² bytes, and a digest that the seed decides."""
    rng = np.random.default_rng(seed)
    tensors = {
        "image_embeddings": rng.normal(size=(1, 2, side, side)).astype(np.float32),
        "high_res_feats_0": rng.normal(size=(1, 1, side, side)).astype(np.float32),
    }
    return Embedding(tensors, (30, 40 + seed), f"digest{seed}", "sam2", "tiny", version)


def assert_equal(got: Embedding | None, want: Embedding, tolerance: float = 0.0) -> None:
    assert got is not None
    assert got.key == want.key
    assert got.original_size == want.original_size
    assert set(got.tensors) == set(want.tensors)
    for name, array in want.tensors.items():
        assert got.tensors[name].dtype == array.dtype
        values = np.asarray(got.tensors[name], np.float64)
        np.testing.assert_allclose(
            values, np.asarray(array, np.float64), rtol=tolerance, atol=tolerance
        )
