"""Short soaks; the long ones are `scripts/soak.py` and `scripts/soak_store.py`."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import soak
import soak_store
from conftest import Exported

from triton_sam.errors import PortInUseError
from triton_sam.images import load_image
from triton_sam.server import EmbeddedServer


def test_nothing_is_lost_wrong_or_left_behind(exported: Exported) -> None:
    figures = soak.soak(exported.repository, calls=300)
    assert figures.unexpected == []
    assert (figures.lost, figures.wrong, figures.restarts) == (0, 0, 2)
    assert (figures.left_tasks, figures.left_threads) == (0, 0)
    assert figures.calls >= 300
    assert figures.outcomes["answered"] > 100 and figures.outcomes["cancelled"] > 20
    # Too short for memory to settle: the long one holds it to 50 MB.
    assert figures.growth_mb < 300


def test_a_restart_that_fails_ends_the_soak(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, starts = EmbeddedServer.start, iter([True, False])

    def once(server: EmbeddedServer) -> EmbeddedServer:
        if next(starts):
            return start(server)
        raise PortInUseError("taken meanwhile")

    monkeypatch.setattr(EmbeddedServer, "start", once)
    with pytest.raises(PortInUseError, match="taken meanwhile"):
        soak.soak(exported.repository, calls=30, restarts=1)


def test_every_image_is_answered_as_itself_from_a_small_store_over_a_kill() -> None:
    figures = soak_store.soak(images=240, every=16)
    assert figures.violations() == []
    assert (figures.answered, figures.kills, len(figures.lives)) == (240, 1, 2)
    assert figures.compared == 15
    for life in figures.lives:
        assert life.counts["store_evictions_total"] > 0
        # Eleven images of 16.8 MB fit; the page of metrics is a second behind.
        assert 0 < life.most_bytes <= 11 * 16_777_216
    # Too short for memory to settle: the long one judges it.
    assert figures.lives[-1].medians() is None


def test_what_the_store_must_not_do_is_seen() -> None:
    counts = {"encodes_total": 9, "store_evictions_total": 4, "store_expired_total": 0}
    memory = [(n, 300.0 + n / 50) for n in range(2001)]
    life = soak_store.Life(memory, {**counts, "store_images": 4}, most_bytes=201)
    figures = soak_store.Figures(200, wrong=["image 3"], lives=[life])
    wrong, over, grown, lost = figures.violations()
    assert wrong == "image 3" and over == "store_bytes was 201, the budget 200"
    assert grown == "memory grew from 313 to 337 MB" and lost.startswith("encoded images are")


def test_the_images_of_the_soak_are_told_apart() -> None:
    asked = list(soak_store.order(2000, seed=0))
    repeats = sum(repeated for _, repeated in asked)
    assert 240 < repeats < 360 and max(number for number, _ in asked) == 1999 - repeats
    pictures = [soak_store.picture(number) for number in range(300)]
    assert max(Counter(one.ground for one in pictures).values()) == 1
    for one in pictures:
        image = np.asarray(load_image(one.content))
        assert image.shape[:2] == one.size
        np.testing.assert_allclose(image[0, 0], one.ground, atol=3)
        if one.disc is not None:
            height, width = one.size
            middle = image[int(0.65 * height), int(0.65 * width)]
            np.testing.assert_allclose(middle, one.disc, atol=3)
