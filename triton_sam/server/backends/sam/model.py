"""The backend ``sam``: a family's predictor, which keeps encoded images beside the decoder.

This file is the door between Triton's python backend and :mod:`triton_sam.predictor`. It runs in
the server's environment, where the package's client is not installed: the package's modules are
imported from ``TRITON_SAM_PACKAGE``, the package's folder, without running its ``__init__``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ....errors import InvalidInputError, MissingExtraError
    from ....predictor.engine import Device, Engine
    from ....predictor.messages import Arrays, PredictorError, Request
    from ....predictor.service import Predictor, Shared
    from ....predictor.settings import COUNTERS, GAUGES, Settings
    from ....processors import default_threads
    from ....specs import family

    # Not installed where this file is type-checked.
    pb_utils: Any
else:
    import triton_python_backend_utils as pb_utils

    _part = types.ModuleType("triton_sam_part")
    _part.__path__ = [os.environ["TRITON_SAM_PACKAGE"]]
    sys.modules.setdefault("triton_sam_part", _part)
    from triton_sam_part.errors import InvalidInputError, MissingExtraError
    from triton_sam_part.predictor.engine import Device, Engine
    from triton_sam_part.predictor.messages import Arrays, PredictorError, Request
    from triton_sam_part.predictor.service import Predictor, Shared
    from triton_sam_part.predictor.settings import COUNTERS, GAUGES, Settings
    from triton_sam_part.processors import default_threads
    from triton_sam_part.specs import family


class TritonPythonModel:
    """One instance: one process, one pair of sessions, one store."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the pair that lies beside the model; ``TritonModelException`` says why not."""
        config = json.loads(args["model_config"])
        given = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        on_gpu = args["model_instance_kind"] == "GPU"
        device = Device("cuda" if on_gpu else "cpu", int(args["model_instance_device_id"] or 0))
        spec = family(given["family"]).named(given.get("variant"))
        # Free of links: the pair may be in the repository and not be served itself.
        root = Path(args["model_repository"]).resolve().parent
        try:
            settings = Settings.read(os.environ, on_gpu)
            engine = Engine(spec, root, device, default_threads())
            self._predictor = Predictor(engine, settings, _shared(settings, engine, root))
        except (InvalidInputError, MissingExtraError) as exc:
            raise pb_utils.TritonModelException(str(exc)) from exc
        except Exception as exc:
            # The classes that ONNX Runtime raises have no base of their own.
            raise pb_utils.TritonModelException(f"{spec.encoder.name}: {exc}") from exc
        labels = {"model": args["model_name"], "device": str(device)}
        self._metrics = Metrics(labels, self._predictor)

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests; each is answered when its turn comes, from another thread."""
        for request in requests:
            self._predictor.submit(_read(request))

    def finalize(self) -> None:
        """Answer what waits and release the sessions."""
        self._metrics.close()
        self._predictor.close()
        # What holds itself may hold memory of Triton's, which is gone when Python looks again.
        gc.collect()


def _shared(settings: Settings, engine: Engine, root: Path) -> Shared | None:
    """What predictors of the pair in ``root`` share, where the settings name a server for it."""
    if not settings.redis_url:
        return None
    if TYPE_CHECKING:
        from ....sharing import SharedStore
    else:
        from triton_sam_part.sharing import SharedStore
    return SharedStore.open(
        settings.redis_url, settings.ttl_s, engine.family, root, engine.hold, engine.make_way
    )


class Metrics:
    """The store's counts on Triton's page of metrics, a second behind at most.

    ``labels``: tell predictors apart that run at the same time.
    """

    def __init__(self, labels: Mapping[str, str], predictor: Predictor) -> None:
        self._predictor = predictor
        self._gauges = {
            name: self._metric(name, text, pb_utils.MetricFamily.GAUGE, labels)
            for name, text in GAUGES.items()
        }
        self._counters = {
            name: self._metric(f"{name}_total", text, pb_utils.MetricFamily.COUNTER, labels)
            for name, text in COUNTERS.items()
        }
        self._counted = dict.fromkeys(COUNTERS, 0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    @staticmethod
    def _metric(name: str, text: str, kind: Any, labels: Mapping[str, str]) -> Any:
        family = pb_utils.MetricFamily(name=f"triton_sam_{name}", description=text, kind=kind)
        metric = family.Metric(labels=dict(labels))
        _keep_for_good(family)
        _keep_for_good(metric)
        return metric

    def _work(self) -> None:
        while not self._over.wait(1.0):
            counts = self._predictor.counts()
            for name, gauge in self._gauges.items():
                gauge.set(counts[name])
            for name, counter in self._counters.items():
                counter.increment(counts[name] - self._counted[name])
                self._counted[name] = counts[name]


def _keep_for_good(metric: Any) -> None:
    """Let a metric, or its family, live until the process is gone.

    Whoever destroys one takes it from every process with the same labels, and Triton crashes or
    hangs when the next one counts: a predictor that was reloaded (server issue 8663). Triton 2.51
    crashes the process itself when it destroys one at its end (8662).
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(metric))


def _read(request: Any) -> Request:
    # The arrays lie in the request's own memory: whoever keeps them keeps the request.
    inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    return Request(
        inputs=inputs,
        outputs=frozenset(request.requested_output_names()),
        reply=partial(_send, request, request.get_response_sender()),
        is_cancelled=request.is_cancelled,
    )


def _send(request: Any, sender: Any, answer: Arrays | PredictorError) -> None:
    if isinstance(answer, PredictorError):
        response = pb_utils.InferenceResponse(error=_error(answer))
    else:
        tensors = [pb_utils.Tensor(name, array) for name, array in answer.items()]
        response = pb_utils.InferenceResponse(output_tensors=tensors)
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _error(error: PredictorError) -> Any:
    kinds = pb_utils.TritonError
    codes = {
        "invalid": kinds.INVALID_ARG,
        "unknown": kinds.NOT_FOUND,
        "busy": kinds.UNAVAILABLE,
        "late": kinds.UNAVAILABLE,
        "cancelled": kinds.CANCELLED,
        "failed": kinds.INTERNAL,
    }
    return pb_utils.TritonError(str(error), codes[error.kind])
