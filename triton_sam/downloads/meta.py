"""Meta's public files, or a mirror of them."""

from __future__ import annotations

import os
from pathlib import Path

from ..specs import Variant
from .remote import RemoteFile

META = "https://dl.fbaipublicfiles.com/"


def meta_file(variant: Variant, folder: Path) -> RemoteFile:
    """The checkpoint of ``variant`` in ``folder``.

    ``TRITON_SAM_MIRROR``: an address that takes the place of ``https://dl.fbaipublicfiles.com/``.
    """
    url = variant.url or ""
    mirror = os.environ.get("TRITON_SAM_MIRROR")
    if mirror:
        url = url.replace(META, mirror.rstrip("/") + "/", 1)
    return RemoteFile(
        target=folder / variant.file,
        url=url,
        origin=variant.url or "-",
        nbytes=variant.nbytes,
        digest=variant.sha256,
    )
