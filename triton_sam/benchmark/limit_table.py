"""What limits each model's own time, as rows."""

from __future__ import annotations

from collections.abc import Iterator

from .record import Record
from .table import ms, size

HEADINGS = (
    "model",
    "operations",
    "weights",
    "inputs + outputs",
    "by operations",
    "by bytes",
    "fastest run",
    "share of the peak",
    "most of its time",
)

ABOUT = (
    "One image and one prompt through each graph of the pair, in ONNX Runtime in process. No "
    "implementation of the same graph beats the larger of the two bounds on this machine: its "
    "products and convolutions at the peak, and its weights, inputs and outputs moved once. A "
    "server that works out part of a graph only once for an image can be below them."
)


def rows(record: Record) -> Iterator[list[str]]:
    """A row for each model: what it has to do, the bounds that follow, and what it takes."""
    for model in record.limits.get("models", []):
        bounds, seconds = model["bounds"], model["seconds"]
        most = list(model["by_operator"].items())[:3]
        yield [
            model["model"],
            f"{model['flops'] / 1e9:.3g} GFLOP",
            size(model["weight_bytes"]),
            size(model["io_bytes"]),
            ms(bounds["operations"]),
            ms(bounds["bytes"]),
            ms(seconds),
            f"{100 * max(bounds.values()) / seconds:.0f} %",
            ", ".join(f"{name} {100 * share:.0f} %" for name, share in most),
        ]


def peak(record: Record) -> str:
    """The peak that the shares refer to, in a sentence."""
    found = record.limits.get("peak")
    if found is None:
        return ""
    return (
        f"Measured peak of this machine: {found['gflops']:.0f} GFLOP/s (float32 matrix product) "
        f"and {found['gbytes']:.1f} GB/s (copy)."
    )
