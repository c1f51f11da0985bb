"""A real Triton server without a container: :class:`EmbeddedServer`.

>>> from triton_sam.server import EmbeddedServer
>>> with EmbeddedServer("model_repository") as server:
...     print(server.grpc_url)

The server comes from a wheel and lives in a private environment under the user's cache folder;
:func:`triton_sam.server.install.ensure_installed` puts it there.
"""

from __future__ import annotations

from . import install
from .embedded import EmbeddedServer

__all__ = ["EmbeddedServer", "install"]
