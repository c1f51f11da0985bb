"""An encoded image: what it holds, what it is called, and how it becomes bytes.

The bytes are a safetensors file: no pickle, readable from any language. Its ``__metadata__``:

==================  ===========================================================
``format``          ``triton-sam-embedding``
``format_version``  ``1``
``family``          the model family, as in ``FAMILIES``
``variant``         of the family, such as ``large``; may be empty
``model_version``   of the encoder that made it; may be empty
``digest``          of the image's pixels
``original_size``   ``[height, width]`` in pixels, as JSON
``crc32``           over the other metadata and every tensor, as 8 hex digits
==================  ===========================================================
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import EmbeddingError
from .files import write_atomically

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "triton-sam-embedding"
FORMAT_VERSION = "1"

_LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header


@dataclass(frozen=True)
class EmbeddingKey:
    """What an embedding is of and what made it: equal keys, equal tensors.

    ``digest``: of the image's pixels. ``family``: the name in ``FAMILIES``. ``variant`` and
    ``model_version``: what tells the encoder from others of its family.
    """

    digest: str
    family: str
    variant: str = ""
    model_version: str = ""

    @property
    def name(self) -> str:
        """40 hex digits that are safe as the name of a file or a Redis key."""
        fields = json.dumps([FORMAT_VERSION, *asdict(self).values()])
        return hashlib.sha256(fields.encode()).hexdigest()[:40]


@dataclass(frozen=True, eq=False)
class Embedding:
    """An encoded image: all that a decoder has to know about it.

    ``tensors``: the encoder's outputs by name, batch 1. ``original_size``: (height, width) in
    pixels. ``digest``: of the pixels. ``family``: the name in ``FAMILIES``. ``variant`` and
    ``model_version``: of the encoder, where they are known.
    """

    tensors: Mapping[str, NDArray[np.generic]]
    original_size: tuple[int, int]
    digest: str
    family: str
    variant: str = ""
    model_version: str = ""

    @property
    def key(self) -> EmbeddingKey:
        """What it is called in a cache."""
        return EmbeddingKey(self.digest, self.family, self.variant, self.model_version)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def save(self, path: str | os.PathLike[str], *, float16: bool = False) -> None:
        """Write it to ``path`` as a safetensors file, whole or not at all.

        ``float16``: half the size; the masks of a loaded one then differ slightly.
        Raises :class:`OSError` when the file cannot be written.
        """
        write_atomically(Path(path), self.to_bytes(float16=float16))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote.

        Raises :class:`OSError` when the file cannot be read and :class:`EmbeddingError` when it is
        damaged or something else.
        """
        return cls.from_bytes(Path(path).read_bytes(), name=repr(os.fspath(path)))

    def to_bytes(self, *, float16: bool = False) -> bytes:
        """The content of the file that :meth:`save` writes."""
        from safetensors.numpy import save

        tensors = {name: _stored(array, float16) for name, array in self.tensors.items()}
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **asdict(self.key),
            "original_size": json.dumps(list(self.original_size)),
        }
        content: bytes = save(tensors, {**metadata, "crc32": _checksum(metadata, tensors)})
        return content

    @classmethod
    def from_bytes(cls, content: bytes, *, name: str = "the embedding") -> Self:
        """Read what :meth:`to_bytes` returned; float16 becomes float32 again.

        The arrays are read-only. ``name``: how an error calls it. Raises
        :class:`EmbeddingError` for bytes that are damaged, cut off or something else.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            metadata = _metadata(content)
            tensors = load(content)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as exc:
            raise EmbeddingError(
                f"{name} of {len(content)} bytes is not an embedding, or is damaged: {exc}. "
                "Encode the image again."
            ) from exc
        _check_format(metadata, name)
        if metadata.pop("crc32", None) != _checksum(metadata, tensors):
            raise EmbeddingError(
                f"{name} is damaged: its checksum does not match. Encode the image again."
            )
        return cls(
            tensors={name: _restored(array) for name, array in tensors.items()},
            original_size=_size(metadata["original_size"]),
            digest=metadata["digest"],
            family=metadata["family"],
            variant=metadata["variant"],
            model_version=metadata["model_version"],
        )


def _stored(array: NDArray[np.generic], float16: bool) -> NDArray[np.generic]:
    if not float16 or array.dtype != np.float32:
        return np.ascontiguousarray(array)
    # Beyond float16's range a value would become infinite and spoil every mask.
    limit = float(np.finfo(np.float16).max)
    half: NDArray[np.float16] = np.clip(array, -limit, limit).astype(np.float16)
    return half


def _restored(array: NDArray[np.generic]) -> NDArray[np.generic]:
    restored = array.astype(np.float32) if array.dtype == np.float16 else array
    restored.flags.writeable = False
    return restored


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, NDArray[np.generic]]) -> str:
    total = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        array = tensors[name]
        total = zlib.crc32(f"{name}:{array.dtype}:{array.shape}".encode(), total)
        total = zlib.crc32(array.reshape(-1).view(np.uint8).data, total)
    return f"{total:08x}"


def _metadata(content: bytes) -> dict[str, str]:
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(content[_LENGTH_BYTES:end])
    return dict(header["__metadata__"])


def _check_format(metadata: Mapping[str, str], name: str) -> None:
    if metadata.get("format") != FORMAT:
        raise EmbeddingError(f"{name} is a safetensors file, but not an embedding of triton-sam.")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise EmbeddingError(
            f"{name} has format version {metadata.get('format_version')}; this triton-sam reads "
            f"{FORMAT_VERSION}. Encode the image again."
        )


def _size(text: str) -> tuple[int, int]:
    height, width = json.loads(text)
    return height, width
