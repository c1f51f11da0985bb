"""The pair in ONNX Runtime, with what an image is encoded to left on the device that decodes."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import sha256
from ..processors import session_options
from ..protocol import Call, Served
from ..specs import MANIFEST_FILE, Family, Model
from ..specs.split import Split, split_decoder

logger = logging.getLogger(__name__)

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

    def __str__(self) -> str:
        return f"{self.name}:{self.number}" if self.name == "cuda" else self.name


class Engine:
    """The encoder and the decoder of ``family``, from the model repository ``root``.

    The decoder is split where its graphs lie beside it (:mod:`triton_sam.specs.split`), so that a
    click computes only what is its own; where they do not (others exported the pair, or an older
    version did) it is the pair's own. ``kept``: what :meth:`encode` returns.

    ``threads``: of each session. On a CPU the encoder runs at a lower priority of the operating
    system: a click that comes while an image is encoded has most of the processor, and the encoder
    has it whenever nobody clicks. ``proven``: the graphs are known to be of this decoder, which
    otherwise the manifest beside them has to say.

    Raises whatever ONNX Runtime raises for a file that it cannot load.
    """

    def __init__(
        self, family: Family, root: Path, device: Device, threads: int, proven: bool = False
    ) -> None:
        self.family = family
        self._device = device
        split = split_decoder(family)
        self._split = split if proven or _is_split(root, family.decoder, split) else None
        load = partial(_session, root, device, threads)
        # The session's own threads inherit the priority of the thread that makes it.
        with ThreadPoolExecutor(1, initializer=self.make_way) as background:
            self._encoder = background.submit(load, family.encoder).result()
            self._prepare = background.submit(load, split.prepare).result() if self._split else None
        self._mask = load(split.mask) if self._split else None
        self._decoder = load(split.click if self._split else family.decoder)
        self._encoding = threading.Lock()
        self._decoding = threading.Lock()
        self.encoder_served = _served(self._encoder)
        if self._split:
            self.kept = split.kept
            names = {tensor.name for tensor in (*family.decoder.inputs, *split.kept)}
            outputs = frozenset(tensor.name for tensor in family.decoder.outputs)
            self.decoder_served = Served(frozenset(names), outputs)
        else:
            known = self.encoder_served.outputs
            self.kept = tuple(t for t in family.encoder.outputs if t.name in known)
            self.decoder_served = _served(self._decoder)

    def make_way(self) -> None:
        """Have this thread give way to those that decode, where they share processors."""
        if self._device.name == "cpu":
            # Of this thread alone, in Linux. A sandbox may forbid it; then they share evenly.
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICENESS)

    def encode(self, call: Call) -> Mapping[str, Any]:
        """What is kept of an image, on the device, by name; in a thread that gives way."""
        with self._encoding:
            outputs = _run(self._encoder, call.inputs, call.outputs, self._device)
            if self._split is None:
                return outputs
            names = [tensor.name for tensor in self._split.kept]
            return _run(self._prepare, outputs, names, self._device)

    def decode(self, call: Call) -> dict[str, NDArray[Any]]:
        """What the decoder says, by output name. Inputs are arrays or what :meth:`encode` gave."""
        with self._decoding:
            inputs = self._with_mask(call.inputs) if self._split else call.inputs
            values = _run(self._decoder, inputs, call.outputs, Device())
        return {name: value.numpy() for name, value in values.items()}

    def _with_mask(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The inputs of a click, with the mask prompt in what is kept of the image."""
        assert self._split is not None
        layout = self.family.prompts
        if layout.mask not in inputs:
            return inputs
        others = {k: v for k, v in inputs.items() if k not in (layout.mask, layout.has_mask)}
        given = {tensor.name: inputs[tensor.name] for tensor in self._split.mask.inputs}
        names = [tensor.name for tensor in self._split.mask.outputs]
        changed = _run(self._mask, given, names, self._device)
        return {**others, **dict(zip(self._split.changed, changed.values(), strict=True))}

    def hold(self, array: NDArray[Any]) -> Any:
        """An array as :meth:`encode` would have given it, on the device that decodes."""
        import onnxruntime as ort

        device = self._device
        return ort.OrtValue.ortvalue_from_numpy(
            np.ascontiguousarray(array), device.name, device.number
        )

    def close(self) -> None:
        """Give the sessions back."""
        del self._encoder, self._prepare, self._mask, self._decoder


def _is_split(root: Path, decoder: Model, split: Split) -> bool:
    """Whether the graphs are there, and of the decoder that is there, whose weights they read."""
    folder = _file(root, decoder).parent
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        graphs = {graph.file: manifest["graphs"][graph.file]["sha256"] for graph in split.graphs}
        exported = {decoder.file: manifest["sha256"], **graphs}
        if all(sha256(folder / name) == digest for name, digest in exported.items()):
            return True
        reason = "those beside it, or it, are not the files that were exported"
    except (OSError, ValueError, LookupError, TypeError):
        reason = "they are not beside it"
    logger.warning(
        "%s runs without click.onnx, prepare.onnx and mask.onnx: %s. Each click computes what "
        "could be kept of the image; `triton-sam export` makes them.",
        decoder.name,
        reason,
    )
    return False


def _file(root: Path, model: Model) -> Path:
    # Free of links: ONNX Runtime refuses weights that seem to lie outside of the model's folder.
    return (root / model.name / "1" / model.file).resolve()


def _session(root: Path, device: Device, threads: int, model: Model) -> Any:
    import onnxruntime as ort

    options = session_options(on_cpu=device.name == "cpu")
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    path = str(_file(root, model))
    return ort.InferenceSession(path, options, providers=device.providers())


def _served(session: Any) -> Served:
    inputs = [*session.get_inputs(), *session.get_overridable_initializers()]
    return Served(
        frozenset(node.name for node in inputs),
        frozenset(node.name for node in session.get_outputs()),
    )


def _run(
    session: Any, inputs: Mapping[str, Any], outputs: Iterable[str], outputs_on: Device
) -> dict[str, Any]:
    import onnxruntime as ort

    binding = session.io_binding()
    for name, value in inputs.items():
        if isinstance(value, np.ndarray):
            # Bound as an array it would have to be a required input of the graph.
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
        binding.bind_ortvalue_input(name, value)
    for name in outputs:
        binding.bind_output(name, outputs_on.name, outputs_on.number)
    session.run_with_iobinding(binding)
    return dict(zip(outputs, binding.get_outputs(), strict=True))
