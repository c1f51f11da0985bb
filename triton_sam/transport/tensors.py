"""Arrays into tritonclient's tensors and back; its HTTP and gRPC modules look alike."""

from __future__ import annotations

from typing import Any

from tritonclient.utils import np_to_triton_dtype

from ..protocol import Arrays, Call


def write_inputs(module: Any, call: Call) -> list[Any]:
    """The inputs of a call for ``tritonclient.http`` or ``tritonclient.grpc``."""
    return [
        module.InferInput(
            name, list(array.shape), np_to_triton_dtype(array.dtype)
        ).set_data_from_numpy(array)
        for name, array in call.inputs.items()
    ]


def read_outputs(result: Any, call: Call) -> Arrays:
    """The outputs that came of those that the call asks for."""
    arrays = {name: result.as_numpy(name) for name in call.outputs}
    return {name: array for name, array in arrays.items() if array is not None}
