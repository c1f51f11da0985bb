"""How far a model is from what the machine can do: its operations against the measured peak."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..specs import Model, Tensor
from .machine import Peak

_AT_MOST_S = 3.0
_RUNS = 5
_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")


@dataclass(frozen=True)
class Work:
    """One run of a model for one image and one prompt.

    ``flops``: floating-point operations of its products and convolutions, two for each
    multiply-add. ``weight_bytes``: its parameters, which every run reads. ``io_bytes``: inputs
    and outputs. ``activation_bytes``: written by its nodes and read by the next, were nothing
    fused. ``seconds``: the fastest of a few runs in ONNX Runtime on this machine. ``by_operator``:
    share of the time, largest first.
    """

    model: str
    flops: float
    weight_bytes: int
    io_bytes: int
    activation_bytes: int
    seconds: float
    by_operator: dict[str, float]

    def bounds(self, peak: Peak) -> dict[str, float]:
        """Seconds that the run cannot beat: by operations alone, and by bytes alone."""
        return {
            "operations": self.flops / peak.gflops / 1e9,
            "bytes": (self.weight_bytes + self.io_bytes) / peak.gbytes / 1e9,
        }


def measure_work(path: Path, model: Model) -> Work:
    """Run the ONNX file of ``model`` in this process and look at what its nodes do.

    The operations are counted on the graph as written, from the shapes that ONNX Runtime's
    profiler saw; the times are those of the optimised one.
    """
    feeds = {tensor.name: _example(tensor) for tensor in model.inputs if not tensor.optional}
    as_written = _profile(path, feeds, optimise=False, runs=1)
    optimised = _profile(path, feeds, optimise=True, runs=_RUNS)
    return Work(
        model=model.name,
        flops=float(sum(_flops(event["args"]) for event in as_written.nodes)),
        weight_bytes=sum(int(e["args"].get("parameter_size", 0)) for e in as_written.nodes),
        io_bytes=sum(array.nbytes for array in [*feeds.values(), *as_written.outputs]),
        activation_bytes=sum(_moved(event["args"]) for event in as_written.nodes),
        seconds=min(optimised.seconds),
        by_operator=_shares(optimised.nodes),
    )


@dataclass(frozen=True)
class _Profile:
    nodes: list[dict[str, Any]]
    outputs: list[NDArray[Any]]
    seconds: list[float]


def _example(tensor: Tensor) -> NDArray[Any]:
    """One image, one prompt of one point; values in the middle of the range."""
    shape = tuple(1 if length == -1 else length for length in tensor.dims)
    return np.full(shape, 0.5 if tensor.dtype == "float32" else 1, tensor.dtype)


def _profile(
    path: Path, feeds: Mapping[str, NDArray[Any]], *, optimise: bool, runs: int
) -> _Profile:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    if not optimise:
        # Packed weights would be missing from the shapes that the profiler sees.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        seconds: list[float] = []
        outputs: list[NDArray[Any]] = []
        while len(seconds) < runs and sum(seconds) < _AT_MOST_S:
            started = time.perf_counter()
            outputs = session.run(None, dict(feeds))
            seconds.append(time.perf_counter() - started)
        events = json.loads(Path(session.end_profiling()).read_text())
    return _Profile([e for e in events if _is_kernel(e)], outputs, seconds)


def _is_kernel(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "Node" and event["name"].endswith("_kernel_time")


def _shapes(listed: Sequence[Mapping[str, Sequence[int]]]) -> list[list[int]]:
    return [list(shape) for entry in listed for shape in entry.values()]


def _flops(args: Mapping[str, Any]) -> int:
    """Two for each multiply-add of a product or a convolution, else none."""
    operator = args.get("op_name")
    if operator not in _PRODUCTS:
        return 0
    inputs, outputs = _shapes(args["input_type_shape"]), _shapes(args["output_type_shape"])
    if operator in ("MatMul", "Gemm"):
        # Every element of the result is a sum over the first operand's last axis.
        depth = inputs[0][-1]
        return 2 * math.prod(outputs[0]) * depth
    # A convolution's weights meet every pixel of its output, a transposed one's of its input,
    # and each image of the batch.
    pixels = outputs[0] if operator == "Conv" else inputs[0]
    return 2 * pixels[0] * math.prod(inputs[1]) * math.prod(pixels[2:])


def _moved(args: Mapping[str, Any]) -> int:
    return int(args.get("activation_size", 0)) + int(args.get("output_size", 0))


def _shares(nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    times: dict[str, float] = {}
    for node in nodes:
        operator = node["args"].get("op_name", "?")
        times[operator] = times.get(operator, 0) + node["dur"]
    total = sum(times.values()) or 1
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return {operator: round(time / total, 4) for operator, time in ordered}
