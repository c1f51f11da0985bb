"""A short soak; the long one is `scripts/soak.py`."""

from __future__ import annotations

import soak
from conftest import Exported


def test_nothing_is_lost_wrong_or_left_behind(exported: Exported) -> None:
    figures = soak.soak(exported.repository, calls=300)
    assert figures.unexpected == []
    assert (figures.lost, figures.wrong, figures.restarts) == (0, 0, 2)
    assert (figures.left_tasks, figures.left_threads) == (0, 0)
    assert figures.calls >= 300
    assert figures.outcomes["answered"] > 100 and figures.outcomes["cancelled"] > 20
    # Too short for memory to settle: the long one holds it to 50 MB.
    assert figures.growth_mb < 300
