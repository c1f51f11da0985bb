"""Segment Anything models on NVIDIA Triton: the client.

>>> from triton_sam import SAM2TritonClient
>>> with SAM2TritonClient("localhost:8000") as client:  # doctest: +SKIP
...     client.set_image("photo.jpg")
...     found = client.segment(point_coords=[[320, 240]], point_labels=[1])
...     found.overlay("photo.jpg").save("found.png")
"""

from __future__ import annotations

from .async_client import AsyncSAM2TritonClient
from .background import BackgroundSAM2Client
from .client import SAM2TritonClient
from .embedding import Embedding
from .errors import (
    AdminError,
    CheckpointError,
    ChecksumError,
    ClientClosedError,
    DiskSpaceError,
    DownloadError,
    EmbeddedServerError,
    EmbeddingError,
    ExportError,
    GatedModelError,
    ImageError,
    ImageNotSetError,
    InferenceError,
    InstallError,
    InvalidInputError,
    LibpythonMissingError,
    MissingExtraError,
    ModelLoadError,
    ModelNotReadyError,
    OfflineError,
    PortInUseError,
    PromptError,
    RepositoryError,
    RequestCancelledError,
    SamError,
    ServerError,
    ServerTimeoutError,
    ServerUnavailableError,
    SharedMemoryError,
    SmokeError,
    UnsupportedPlatformError,
)
from .hover import Hover, HoverResult
from .masks import Segmentation
from .sessions import SessionStatus
from .speculative_client import (
    SpeculativeSAM2Client,
    queue_multiple_requests,
    wait_for_latest_result,
)
from .transport import Retries, TransportOptions

__all__ = [
    "AdminError",
    "AsyncSAM2TritonClient",
    "BackgroundSAM2Client",
    "CheckpointError",
    "ChecksumError",
    "ClientClosedError",
    "DiskSpaceError",
    "DownloadError",
    "EmbeddedServerError",
    "Embedding",
    "EmbeddingError",
    "ExportError",
    "GatedModelError",
    "Hover",
    "HoverResult",
    "ImageError",
    "ImageNotSetError",
    "InferenceError",
    "InstallError",
    "InvalidInputError",
    "LibpythonMissingError",
    "MissingExtraError",
    "ModelLoadError",
    "ModelNotReadyError",
    "OfflineError",
    "PortInUseError",
    "PromptError",
    "RepositoryError",
    "RequestCancelledError",
    "Retries",
    "SAM2TritonClient",
    "SamError",
    "Segmentation",
    "ServerError",
    "ServerTimeoutError",
    "ServerUnavailableError",
    "SessionStatus",
    "SharedMemoryError",
    "SmokeError",
    "SpeculativeSAM2Client",
    "TransportOptions",
    "UnsupportedPlatformError",
    "__version__",
    "queue_multiple_requests",
    "wait_for_latest_result",
]

__version__: str


def __getattr__(name: str) -> str:
    # Looked up when asked for: reading the installed metadata is slower than the import.
    if name == "__version__":
        from importlib.metadata import version

        return version("triton-sam")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
