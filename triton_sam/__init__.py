"""Segment Anything models on NVIDIA Triton: the client.

>>> from triton_sam import SAM2TritonClient
>>> with SAM2TritonClient("localhost:8000") as client:  # doctest: +SKIP
...     client.set_image("photo.jpg")
...     found = client.segment(point_coords=[[320, 240]], point_labels=[1])
...     found.overlay("photo.jpg").save("found.png")
"""

from __future__ import annotations

from .client import SAM2TritonClient
from .errors import (
    CheckpointError,
    ClientClosedError,
    EmbeddedServerError,
    ExportError,
    ImageError,
    ImageNotSetError,
    InferenceError,
    InstallError,
    InvalidInputError,
    LibpythonMissingError,
    MissingExtraError,
    ModelLoadError,
    ModelNotReadyError,
    PortInUseError,
    PromptError,
    RepositoryError,
    SamError,
    ServerError,
    ServerTimeoutError,
    ServerUnavailableError,
    UnsupportedPlatformError,
)
from .masks import Segmentation

__all__ = [
    "CheckpointError",
    "ClientClosedError",
    "EmbeddedServerError",
    "ExportError",
    "ImageError",
    "ImageNotSetError",
    "InferenceError",
    "InstallError",
    "InvalidInputError",
    "LibpythonMissingError",
    "MissingExtraError",
    "ModelLoadError",
    "ModelNotReadyError",
    "PortInUseError",
    "PromptError",
    "RepositoryError",
    "SAM2TritonClient",
    "SamError",
    "Segmentation",
    "ServerError",
    "ServerTimeoutError",
    "ServerUnavailableError",
    "UnsupportedPlatformError",
    "__version__",
]

__version__: str


def __getattr__(name: str) -> str:
    # Looked up when asked for: reading the installed metadata is slower than the import.
    if name == "__version__":
        from importlib.metadata import version

        return version("triton-sam")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
