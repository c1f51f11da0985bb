"""What the package shows, and what importing it loads."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import triton_sam
from triton_sam import errors
from triton_sam.benchmark.cold import import_times

ERRORS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and value.__module__ == errors.__name__
}


def test_exported_names() -> None:
    assert set(triton_sam.__all__) == ERRORS | {
        "AsyncSAM2TritonClient",
        "BackgroundSAM2Client",
        "Embedding",
        "Hover",
        "HoverResult",
        "Retries",
        "SAM2TritonClient",
        "Segmentation",
        "SessionStatus",
        "SpeculativeSAM2Client",
        "TransportOptions",
        "__version__",
        "queue_multiple_requests",
        "wait_for_latest_result",
    }
    for name in triton_sam.__all__:
        assert getattr(triton_sam, name) is not None


def test_every_error_is_in_the_tree_at_the_top_of_its_file() -> None:
    assert errors.__doc__ is not None
    for name in ERRORS:
        assert issubclass(getattr(errors, name), errors.SamError)
        assert name in errors.__doc__


def test_version_is_that_of_the_installed_package() -> None:
    assert triton_sam.__version__ == version("triton-sam")


def test_unknown_attribute() -> None:
    assert not hasattr(triton_sam, "Nothing")


def test_the_package_is_typed() -> None:
    assert (Path(triton_sam.__file__).parent / "py.typed").is_file()


def test_importing_the_package_is_quick() -> None:
    beneath, beyond = import_times().values()
    assert beneath > 0 and 0 < beyond < 0.5


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ["torch", "onnx", "onnxruntime", "matplotlib", "cv2", "scipy", "aiohttp", "grpc"]
    code = (
        "import sys, triton_sam\n"
        f"loaded = [n for n in {heavy} if n in sys.modules]\n"
        "sys.exit(' '.join(loaded) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
