"""What tells a served model from another one of the same name: the answer to a fixed question.

Triton's metadata names a model and its version folder, not the checkpoint in it. The decoder, which
comes from the same checkpoint as its encoder, is asked for one point in a made-up embedding. What
it says, rounded, is the name under which embeddings of this pair are cached. Two machines that
round differently share no entries; two checkpoints never do, unless their decoders are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .embedding import Embedding
from .prompts import Prompt
from .protocol import Arrays, Call, Served, decode_calls, read_prediction
from .specs import Family, Tensor

_GRID = 4
_DECIMALS = 2


def probe_calls(family: Family, served: Served) -> list[Call]:
    """The question to the decoder that ``served`` describes."""
    return decode_calls(family, _made_up(family), _point(family), served)


def read_fingerprint(family: Family, answers: Sequence[Arrays], served: Served) -> str:
    """16 hex digits from the answers to :func:`probe_calls`."""
    prediction = read_prediction(family, answers, _point(family), served)
    rows, columns = (_positions(length) for length in prediction.logits.shape[-2:])
    seen = np.rint(prediction.logits[..., rows[:, None], columns]) + 0.0  # no negative zeros
    scores = np.round(prediction.scores, _DECIMALS) + 0.0
    return hashlib.sha256(seen.tobytes() + scores.tobytes()).hexdigest()[:16]


def _made_up(family: Family) -> Embedding:
    """Only what the decoder cannot do without, so that little travels."""
    needed = {tensor.name for tensor in family.decoder.inputs if not tensor.optional}
    features = {t.name: _waves(t) for t in family.encoder.outputs if t.name in needed}
    side = family.image.size
    return Embedding(features, (side, side), "probe", family.name)


def _waves(tensor: Tensor) -> NDArray[np.float32]:
    shape = [max(1, length) for length in tensor.dims]
    return np.sin(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)


def _point(family: Family) -> Prompt:
    side = family.image.size
    centre = [[side / 2, side / 2]]
    return Prompt.create(centre, [1], original_size=(side, side), layout=family.prompts)


def _positions(length: int) -> NDArray[np.intp]:
    return (np.arange(_GRID) * 2 + 1) * length // (2 * _GRID)
