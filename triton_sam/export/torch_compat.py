"""Makes torchvision importable beside a CPU build of torch."""

from __future__ import annotations

import torch

_DETECTION_OPS = ("torchvision::nms", "torchvision::qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def prepare_torchvision() -> None:
    """Declare the operators that torchvision registers fake kernels for at import.

    torchvision's wheels on PyPI are built against CUDA. Beside a CPU torch their C++ library
    does not load, so these operators do not exist and ``import torchvision`` ends in
    "operator torchvision::nms does not exist". Segment Anything never calls them: declaring
    them is enough. Harmless where the library does load.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in _DETECTION_OPS:
            torch.library.define(name, _SCHEMA)
