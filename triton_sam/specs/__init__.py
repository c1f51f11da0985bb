"""The table of model families: the one place that names tensors, sizes, checkpoints and variants.

The exporter, the config generator, the client, the downloads and the benchmarks all read
:data:`FAMILIES`. A new family is one file here and one export wrapper.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..errors import InvalidInputError
from .sam1 import SAM1
from .sam2 import SAM2
from .sam3 import SAM3
from .types import (
    MANIFEST_FILE,
    DType,
    Family,
    HubFiles,
    ImageSpec,
    Model,
    PromptLayout,
    PublishedPair,
    Tensor,
    Variant,
)

__all__ = [
    "FAMILIES",
    "MANIFEST_FILE",
    "DType",
    "Family",
    "HubFiles",
    "ImageSpec",
    "Model",
    "PromptLayout",
    "PublishedPair",
    "Tensor",
    "Variant",
    "family",
]

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.name: family for family in (SAM1, SAM2, SAM3)}
)


def family(name: str) -> Family:
    """The family called ``name``. Raises :class:`InvalidInputError` when there is none."""
    try:
        return FAMILIES[name]
    except KeyError:
        raise InvalidInputError(
            f"Unknown model type {name!r}; choose one of: {', '.join(FAMILIES)}."
        ) from None
