"""Arrays into tritonclient's tensors and back; its HTTP and gRPC modules look alike."""

from __future__ import annotations

from typing import Any

import numpy as np
from tritonclient.utils import np_to_triton_dtype

from ..protocol import Arrays, Call
from ..shared_memory import Place


def write_inputs(module: Any, call: Call) -> list[Any]:
    """The inputs of a call for ``tritonclient.http`` or ``tritonclient.grpc``."""
    sent = [
        module.InferInput(
            name, list(array.shape), np_to_triton_dtype(array.dtype)
        ).set_data_from_numpy(array)
        for name, array in call.inputs.items()
    ]
    return sent + [
        module.InferInput(name, list(place.shape), datatype(place)).set_shared_memory(
            place.region, place.nbytes, place.offset
        )
        for name, place in call.inputs_at.items()
    ]


def write_outputs(module: Any, call: Call) -> list[Any]:
    """The outputs that a call asks for."""
    outputs = [module.InferRequestedOutput(name) for name in call.outputs]
    for output in outputs:
        place = call.outputs_at.get(output.name())
        if place is not None:
            output.set_shared_memory(place.region, place.nbytes, place.offset)
    return outputs


def datatype(place: Place) -> str:
    """Triton's name for what lies there."""
    return str(np_to_triton_dtype(np.dtype(place.dtype)))


def read_outputs(result: Any, call: Call) -> Arrays:
    """The outputs that came of those that the call asks for.

    Raises ``ValueError`` for one that was put into shared memory and is not what belongs there.
    """
    for name, place in call.outputs_at.items():
        _check_placed(name, place, result.get_output(name))
    sent = (name for name in call.outputs if name not in call.outputs_at)
    arrays = {name: result.as_numpy(name) for name in sent}
    return {name: array for name, array in arrays.items() if array is not None}


def _check_placed(name: str, place: Place, output: Any) -> None:
    kind, shape = "nothing", ()
    if output is not None:
        over_http = isinstance(output, dict)
        kind = output["datatype"] if over_http else output.datatype
        shape = tuple(output["shape"] if over_http else output.shape)
    if (kind, shape) != (datatype(place), place.shape):
        raise ValueError(
            f"{name!r} in shared memory is {kind} of shape {shape}; expected {datatype(place)} of "
            f"shape {place.shape}"
        )
