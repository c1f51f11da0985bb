"""What can be asked of a server, whatever the protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..protocol import Call


@dataclass(frozen=True, eq=False)
class Infer:
    """Run a model. Answered with its outputs by name: ``Arrays``."""

    call: Call

    @property
    def model(self) -> str:
        return self.call.model


@dataclass(frozen=True)
class Describe:
    """What does a model declare? Answered with :class:`~triton_sam.protocol.Served`."""

    model: str


@dataclass(frozen=True)
class IsReady:
    """Is a model ready? Answered with a bool."""

    model: str


@dataclass(frozen=True)
class ListReady:
    """Which models are ready? Answered with a list of their names."""


@dataclass(frozen=True)
class Register:
    """Use shared memory of this name and size. Answered with nothing."""

    region: str
    nbytes: int


@dataclass(frozen=True)
class Unregister:
    """Forget a region of shared memory. Answered with nothing."""

    region: str


@dataclass(frozen=True)
class ListRegions:
    """Which regions are known? Answered with a frozenset of their names."""


Memory: TypeAlias = "Register | Unregister | ListRegions"
Request: TypeAlias = "Infer | Describe | IsReady | ListReady | Memory"
