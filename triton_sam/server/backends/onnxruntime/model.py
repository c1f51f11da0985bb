"""ONNX Runtime as a backend of the embedded Triton server.

The wheel that the embedded server comes from has Triton's python backend but not its ONNX
Runtime backend. This file, in a folder named ``onnxruntime`` inside the backend directory, takes
its place: models with ``backend: "onnxruntime"`` load with their configuration as it is. The
container has Triton's own backend, in C++, and does not use this file.

What it keeps of that backend: the configuration is checked against the graph when the model
loads; an input is optional in the configuration exactly when the graph has a default for it; the
parameters ``intra_op_thread_count`` and ``inter_op_thread_count`` are read. What differs: only
the requested outputs are computed, a request that its client has cancelled is not run, and
sessions have the options of :func:`triton_sam.processors.session_options`. Text tensors
(``TYPE_STRING``) and ``reshape`` are refused.

It runs in the server's private environment, where the package's client is not installed: the one
module that it needs of the package comes from ``TRITON_SAM_PACKAGE``, the package's folder.
"""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ....processors import default_threads, session_options

    # Neither is installed where this file is type-checked.
    ort: Any
    pb_utils: Any
else:
    import onnxruntime as ort
    import triton_python_backend_utils as pb_utils

    _part = types.ModuleType("triton_sam_part")
    _part.__path__ = [os.environ["TRITON_SAM_PACKAGE"]]
    sys.modules.setdefault("triton_sam_part", _part)
    from triton_sam_part.processors import default_threads, session_options

TENSOR_TYPES = {
    "TYPE_BOOL": "tensor(bool)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_UINT16": "tensor(uint16)",
    "TYPE_UINT32": "tensor(uint32)",
    "TYPE_UINT64": "tensor(uint64)",
    "TYPE_INT8": "tensor(int8)",
    "TYPE_INT16": "tensor(int16)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP64": "tensor(double)",
}


class TritonPythonModel:
    """One instance of a model: one process, one session."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the graph; a ``TritonModelException`` says why it cannot be served."""
        config = json.loads(args["model_config"])
        path = model_path(Path(args["model_repository"]), args["model_version"], config)
        providers = execution_providers(
            args["model_instance_kind"],
            args["model_instance_device_id"],
            ort.get_available_providers(),
        )
        options = options_of(config, on_cpu=len(providers) == 1)
        try:
            session = ort.InferenceSession(str(path), sess_options=options, providers=providers)
        except Exception as exc:
            # The classes that ONNX Runtime raises have no base of their own.
            raise pb_utils.TritonModelException(f"{path.name} cannot be loaded: {exc}") from exc
        problem = next(mismatches(config, session), None)
        if problem is not None:
            raise pb_utils.TritonModelException(problem)
        self._session = session

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request on its own."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        if request.is_cancelled():
            return failure("The client cancelled the request.", pb_utils.TritonError.CANCELLED)
        names = list(request.requested_output_names())
        feeds = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            arrays = self._session.run(names, feeds)
        except Exception as exc:
            # The request is at fault or the graph is; either way the model goes on.
            return failure(str(exc), pb_utils.TritonError.INVALID_ARG)
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor(name, array) for name, array in zip(names, arrays, strict=True)
            ]
        )

    def finalize(self) -> None:
        """Release the session."""
        del self._session


def failure(message: str, code: Any) -> Any:
    """An answer that is an error."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def model_path(model: Path, version: str, config: Mapping[str, Any]) -> Path:
    """The file of ``version`` in the folder of ``model``, free of links.

    ONNX Runtime refuses external data that seems to lie outside of the model's folder.
    """
    path = model / version / (config.get("default_model_filename") or "model.onnx")
    if not path.exists():
        raise pb_utils.TritonModelException(f"there is no file {path}")
    return path.resolve()


def execution_providers(kind: str, device_id: str, available: Sequence[str]) -> list[Any]:
    """The processors to run on, the preferred one first."""
    providers: list[Any] = ["CPUExecutionProvider"]
    if kind == "GPU" and "CUDAExecutionProvider" in available:
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(device_id)}))
    return providers


def options_of(config: Mapping[str, Any], *, on_cpu: bool) -> Any:
    """How ONNX Runtime runs the model."""
    options = session_options(on_cpu=on_cpu)
    options.intra_op_num_threads = thread_count(config, "intra_op_thread_count", default_threads())
    options.inter_op_num_threads = thread_count(config, "inter_op_thread_count", 1)
    return options


def thread_count(config: Mapping[str, Any], name: str, default: int) -> int:
    """The model parameter ``name``; zero or none stands for ``default``."""
    text = config.get("parameters", {}).get(name, {}).get("string_value") or "0"
    try:
        return max(0, int(text)) or default
    except ValueError as exc:
        raise pb_utils.TritonModelException(
            f"the parameter {name} is {text!r}, expected a whole number"
        ) from exc


def mismatches(config: Mapping[str, Any], session: Any) -> Iterator[str]:
    """What the configuration says of the model's tensors that the graph contradicts."""
    required = {node.name: node for node in session.get_inputs()}
    defaulted = {node.name: node for node in session.get_overridable_initializers()}
    outputs = {node.name: node for node in session.get_outputs()}
    batched = config.get("max_batch_size", 0) > 0
    inputs = config.get("input", [])
    for tensor in inputs:
        yield from _tensor_mismatches("input", tensor, {**required, **defaulted}, batched)
        yield from _optional_mismatches(tensor, defaulted, batched)
    for tensor in config.get("output", []):
        yield from _tensor_mismatches("output", tensor, outputs, batched)
    named = {tensor["name"] for tensor in inputs}
    for name in required:
        if name not in named:
            yield f"the graph needs the input {name!r}, which the configuration does not have"


def _tensor_mismatches(
    role: str, tensor: Mapping[str, Any], nodes: Mapping[str, Any], batched: bool
) -> Iterator[str]:
    name = tensor["name"]
    if name not in nodes:
        known = ", ".join(repr(node) for node in nodes)
        yield f"the configuration has the {role} {name!r}, and the graph has only {known}"
        return
    node = nodes[name]
    if tensor.get("reshape"):
        yield f"the {role} {name!r} has a reshape, which is not supported here"
    if TENSOR_TYPES.get(tensor["data_type"]) != node.type:
        yield (
            f"the {role} {name!r} is {tensor['data_type']} in the configuration "
            f"and {node.type} in the graph"
        )
    configured = [int(dim) for dim in tensor["dims"]]
    expected = [-1, *configured] if batched else configured
    dims = [dim if isinstance(dim, int) else -1 for dim in node.shape]
    # An axis that is free in the graph takes any size; one that is fixed has to be named.
    if len(dims) != len(expected) or any(
        dim not in (-1, other) for dim, other in zip(dims, expected, strict=True)
    ):
        yield (
            f"the {role} {name!r} has dims {expected} in the configuration and {dims} in the graph"
        )


def _optional_mismatches(
    tensor: Mapping[str, Any], defaulted: Mapping[str, Any], batched: bool
) -> Iterator[str]:
    name, optional = tensor["name"], bool(tensor.get("optional"))
    if optional and batched:
        yield f"the input {name!r} is optional, which max_batch_size above 0 does not allow"
    elif optional and name not in defaulted:
        yield f"the input {name!r} is optional in the configuration and has no default in the graph"
    elif not optional and name in defaulted:
        yield f"the input {name!r} has a default in the graph and is not optional in the config"
