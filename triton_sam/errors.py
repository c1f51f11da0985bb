"""Every error that triton_sam raises on purpose.

SamError
├── InvalidInputError (ValueError)      what the caller passed cannot be used
│   ├── ImageError                      not an image, truncated, too large, empty
│   ├── PromptError                     points, labels, boxes or masks that do not fit
│   └── EmbeddingError                  not an embedding, damaged, or of another model
├── ImageNotSetError (RuntimeError)     predict before set_image
├── ClientClosedError (RuntimeError)    a call on a client after close()
├── RequestCancelledError (RuntimeError)   every request that was waited for has been cancelled
├── ServerError                         talking to a Triton server failed
│   ├── ServerUnavailableError (ConnectionError)   nobody answers at the address
│   ├── ServerTimeoutError (TimeoutError)          no answer in time
│   ├── ModelNotReadyError              the server runs, the model does not
│   ├── InferenceError                  the server answered with an error
│   ├── SharedMemoryError               no memory that the server can open too
│   └── AdminError                      loading a model anew was refused, or the key is wrong
├── DownloadError                       a file could not be fetched; run again to go on
│   ├── OfflineError                    files are missing and nothing may be downloaded
│   ├── GatedModelError                 the hub wants a token or an accepted licence
│   ├── ChecksumError                   what came is not the file that was asked for
│   └── DiskSpaceError                  the file does not fit on the disk
├── CheckpointError                     a checkpoint that is missing, damaged or of another model
├── ExportError                         an export that did not reproduce its PyTorch model
├── RepositoryError                     the model repository is incomplete or inconsistent
├── SmokeError                          a server answers, but not as a model that works
├── EmbeddedServerError                 the embedded server cannot be installed or started
│   ├── UnsupportedPlatformError        no server binary for this machine
│   ├── PortInUseError                  another program holds the port
│   ├── LibpythonMissingError           the interpreter's shared library is not installed
│   ├── InstallError                    download, hash or disk problem while installing it
│   └── ModelLoadError                  the server refused a model
└── MissingExtraError (ImportError)     an optional dependency is not installed

Each message is one or more plain sentences: what was expected, what came, what to do next.
"""


class SamError(Exception):
    """Base of all errors of this library."""


class InvalidInputError(SamError, ValueError):
    """An argument cannot be used; nothing was sent."""


class ImageError(InvalidInputError):
    """The image is not one, is damaged, or is larger than the limit."""


class PromptError(InvalidInputError):
    """Points, labels, boxes or a mask prompt do not fit together or are not finite."""


class EmbeddingError(InvalidInputError):
    """A file or its bytes are no embedding, are damaged, or belong to another model."""


class ImageNotSetError(SamError, RuntimeError):
    """A prediction was asked for before ``set_image``."""


class ClientClosedError(SamError, RuntimeError):
    """The client was closed; it makes no more calls."""


class RequestCancelledError(SamError, RuntimeError):
    """There is no result, because every request that was waited for has been cancelled."""


class ServerError(SamError):
    """Talking to a Triton server failed."""


class ServerUnavailableError(ServerError, ConnectionError):
    """No server answers at the address."""


class ServerTimeoutError(ServerError, TimeoutError):
    """The server did not answer within the time given."""


class ModelNotReadyError(ServerError):
    """The server runs but does not serve the model."""


class InferenceError(ServerError):
    """The server answered the call with an error.

    ``reason``: what the model itself said. ``is_invalid``: whether it refused the request for what
    was in it.
    """

    def __init__(self, message: str, reason: str = "", is_invalid: bool = False) -> None:
        super().__init__(message)
        self.reason = reason or message
        self.is_invalid = is_invalid


class SharedMemoryError(ServerError):
    """The client has no memory that the server can open, or the server does not take it."""


class AdminError(ServerError):
    """An administrative request was refused: no key, a wrong key, or a model that cannot load."""


class DownloadError(SamError):
    """A file could not be fetched. What came of it is kept; running again goes on from there."""


class OfflineError(DownloadError):
    """Files are missing, and downloading was ruled out."""


class GatedModelError(DownloadError):
    """The hub gives the file only to accounts that have accepted its licence."""


class ChecksumError(DownloadError):
    """What the server has is not the file that was asked for: its size or hash differs."""


class DiskSpaceError(DownloadError):
    """There is less free space than the file needs."""


class CheckpointError(SamError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class ExportError(SamError):
    """An exported model does not reproduce the PyTorch model within tolerance."""


class RepositoryError(SamError):
    """The model repository is incomplete or inconsistent."""


class SmokeError(SamError):
    """A running server answered, and not as a model that works does."""


class EmbeddedServerError(SamError):
    """The embedded Triton server cannot be installed, started or kept running."""


class UnsupportedPlatformError(EmbeddedServerError):
    """There is no server binary for this operating system, processor or C library."""


class PortInUseError(EmbeddedServerError):
    """Another program already listens on the requested port."""


class LibpythonMissingError(EmbeddedServerError):
    """The shared library of the Python interpreter cannot be found."""


class InstallError(EmbeddedServerError):
    """Installing the server failed: no network, wrong hash, or no space."""


class ModelLoadError(EmbeddedServerError):
    """The server started but refused to load a model."""


class MissingExtraError(SamError, ImportError):
    """An optional dependency is needed for what was asked and is not installed."""
