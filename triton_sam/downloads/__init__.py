"""Checkpoints and published models, downloaded once and known to be right.

Meta's files are held against the hashes in the table, the hub's against what the hub declares.
Interrupted downloads are kept beside the target as ``.part`` and go on from there.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InvalidInputError
from ..specs import Family, HubFiles
from .hub import hub_file
from .meta import meta_file
from .notes import sha256_of
from .published import published_files
from .remote import RemoteFile, readable
from .store import Store
from .transfer import Patience

__all__ = [
    "Patience",
    "RemoteFile",
    "Store",
    "checkpoint_files",
    "is_offline",
    "published_files",
    "readable",
    "sha256_of",
]

_TRUE = {"1", "on", "true", "yes"}


def is_offline() -> bool:
    """Whether ``TRITON_SAM_OFFLINE`` or ``HF_HUB_OFFLINE`` rules downloads out."""
    names = ("TRITON_SAM_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(name, "").lower() in _TRUE for name in names)


def checkpoint_files(
    family: Family, variant: str | None, folder: Path, patience: Patience | None = None
) -> list[RemoteFile]:
    """The files of a variant's checkpoint, to be put into ``folder``.

    Raises :class:`InvalidInputError` for a variant that is not published anywhere.
    """
    chosen = family.variant(variant)
    if chosen.hub is not None:
        return _hub_files(chosen.hub, folder / chosen.file, patience)
    if chosen.url is None:
        known = [name for name, v in family.variants.items() if v.url or v.hub]
        raise InvalidInputError(
            f"{family.title} {chosen.name} is not downloaded; choose one of: {', '.join(known)}."
        )
    return [meta_file(chosen, folder)]


def _hub_files(hub: HubFiles, folder: Path, patience: Patience | None) -> list[RemoteFile]:
    return [
        hub_file(hub.repository, path, folder / path, revision=hub.revision, patience=patience)
        for path in hub.files
    ]
