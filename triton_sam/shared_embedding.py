"""Embeddings in memory that client and server share: how they are made, lent and taken back."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .embedding import Embedding
from .protocol import Call
from .shared_memory import Place, Region
from .specs import Family


@dataclass(frozen=True, eq=False)
class SharedEmbedding(Embedding):
    """An encoded image in a region; ``tensors`` are views of it, ``places`` say where they are."""

    places: Mapping[str, Place] = field(kw_only=True)
    region: Region = field(kw_only=True)

    def placed(self, call: Call) -> Call:
        """``call`` with the tensors of this embedding left where they are."""
        inputs = {name: array for name, array in call.inputs.items() if name not in self.places}
        at = {name: place for name, place in self.places.items() if name in call.inputs}
        return replace(call, inputs=inputs, inputs_at=at)


class Regions:
    """The regions of one client that its server knows. Safe to use from threads."""

    def __init__(self) -> None:
        self._lent: dict[str, Region] = {}
        self._released: deque[str] = deque()

    def __contains__(self, region: Region) -> bool:
        return region.name in self._lent

    def lend(self, region: Region) -> None:
        """Note that the server is told of ``region``."""
        self._lent[region.name] = region

    def end_with(self, embedding: SharedEmbedding, region: Region) -> None:
        """Release ``region`` when ``embedding`` is not used any more."""
        weakref.finalize(embedding, self.release, region)

    def release(self, region: Region) -> None:
        """Remove a region; the server, which may still be at work on it, is told later."""
        if self._lent.pop(region.name, None) is not None:
            region.remove()
            self.forget(region.name)

    def forget(self, name: str) -> None:
        """Note that the server is to forget a region."""
        self._released.append(name)

    def release_all(self) -> None:
        for region in list(self._lent.values()):
            self.release(region)

    def take_released(self) -> str | None:
        """The name of a region that the server is to forget."""
        try:
            return self._released.popleft()
        except IndexError:
            return None


def make_region(family: Family, outputs: tuple[str, ...]) -> tuple[Region, dict[str, Place]]:
    """Room for one image's ``outputs`` of the encoder, and where each of them belongs."""
    shapes = {name: (1, *family.encoder.output(name).dims[1:]) for name in outputs}
    dtypes = {name: family.encoder.output(name).dtype for name in outputs}
    end, offsets = 0, {}
    for name in outputs:
        offsets[name] = end
        end += Place("", 0, dtypes[name], shapes[name]).nbytes
    region = Region(end)
    return region, {
        name: Place(region.name, offsets[name], dtypes[name], shapes[name]) for name in outputs
    }
