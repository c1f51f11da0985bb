"""The pair's files in ONNX Runtime, with the encoder's outputs left on the device that decodes."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..protocol import Call, Served
from ..specs import Family, Model

# Of the encoder's threads: a click then has three quarters of the processors, and an image is
# encoded though others click without end.
_BACKGROUND_NICENESS = 5


@dataclass(frozen=True)
class Device:
    """Where the sessions run: ``cpu``, or ``cuda`` with the GPU's number."""

    name: str = "cpu"
    number: int = 0

    def providers(self) -> list[Any]:
        """ONNX Runtime's execution providers, the preferred one first."""
        cuda = (
            [("CUDAExecutionProvider", {"device_id": self.number})] if self.name == "cuda" else []
        )
        return [*cuda, "CPUExecutionProvider"]


class Engine:
    """The encoder and the decoder of ``family``, from the model repository ``root``.

    ``threads``: of each session. On a CPU the encoder runs at a lower priority of the operating
    system: a click that comes while an image is encoded has most of the processor, and the encoder
    has it whenever nobody clicks.

    Raises whatever ONNX Runtime raises for a file that it cannot load.
    """

    def __init__(self, family: Family, root: Path, device: Device, threads: int) -> None:
        self.family = family
        self._device = device
        # The session's own threads inherit the priority of the thread that makes it.
        with ThreadPoolExecutor(1, initializer=self.make_way) as background:
            made = background.submit(_session, root, family.encoder, device, threads)
            self._encoder = made.result()
        self._decoder = _session(root, family.decoder, device, threads)
        self._encoding = threading.Lock()
        self._decoding = threading.Lock()
        self.encoder_served = _served(self._encoder)
        self.decoder_served = _served(self._decoder)

    def make_way(self) -> None:
        """Have this thread give way to those that decode, where they share processors."""
        if self._device.name == "cpu":
            # Of this thread alone, in Linux. A sandbox may forbid it; then they share evenly.
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICENESS)

    def encode(self, call: Call) -> Mapping[str, Any]:
        """What the encoder says, on the device, by output name; in a thread that gives way."""
        with self._encoding:
            return _run(self._encoder, call, self._device)

    def decode(self, call: Call) -> dict[str, NDArray[Any]]:
        """What the decoder says, by output name. Inputs are arrays or what :meth:`encode` gave."""
        with self._decoding:
            values = _run(self._decoder, call, Device())
        return {name: value.numpy() for name, value in values.items()}

    def close(self) -> None:
        """Give the sessions back."""
        del self._encoder, self._decoder


def _session(root: Path, model: Model, device: Device, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors: its warnings are about how a graph was exported
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Free of links: ONNX Runtime refuses weights that seem to lie outside of the model's folder.
    path = (root / model.name / "1" / model.file).resolve()
    return ort.InferenceSession(str(path), options, providers=device.providers())


def _served(session: Any) -> Served:
    inputs = [*session.get_inputs(), *session.get_overridable_initializers()]
    return Served(
        frozenset(node.name for node in inputs),
        frozenset(node.name for node in session.get_outputs()),
    )


def _run(session: Any, call: Call, outputs_on: Device) -> dict[str, Any]:
    import onnxruntime as ort

    binding = session.io_binding()
    for name, value in call.inputs.items():
        if isinstance(value, np.ndarray):
            # Bound as an array it would have to be a required input of the graph.
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
        binding.bind_ortvalue_input(name, value)
    for name in call.outputs:
        binding.bind_output(name, outputs_on.name, outputs_on.number)
    session.run_with_iobinding(binding)
    return dict(zip(call.outputs, binding.get_outputs(), strict=True))
