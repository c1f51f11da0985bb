"""The predictor's own queue: order, company, and what is not run at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from triton_sam.predictor.jobs import Job, Jobs, Priority, QueueFullError


class Noted:
    """Makes jobs that note what became of them."""

    def __init__(self) -> None:
        self.dropped: dict[Any, str] = {}

    def job(self, name: Any, **fields: Any) -> Job:
        def drop(reason: str) -> None:
            self.dropped[name] = reason

        return Job(run=lambda jobs: None, drop=drop, subject=name, **fields)


def names(jobs: list[Job]) -> list[Any]:
    return [job.subject for job in jobs]


def taken(jobs: Jobs) -> list[list[Any]]:
    jobs.close()
    found = []
    while batch := jobs.take():
        found.append(names(batch))
    return found


def test_clicks_before_hovers_before_prefetches_each_in_order() -> None:
    jobs, noted = Jobs(limit=100), Noted()
    for index in range(3):
        for priority in (Priority.PREFETCH, Priority.HOVER, Priority.CLICK):
            jobs.put(noted.job((priority.name, index), priority=priority))
    order = [name for (name,) in taken(jobs)]
    assert order == [(p, i) for p in ("CLICK", "HOVER", "PREFETCH") for i in range(3)]


def test_what_is_cancelled_is_dropped_at_the_last_moment() -> None:
    jobs, noted = Jobs(limit=200), Noted()
    cancelled: set[int] = set()

    def asks(number: int) -> Callable[[], bool]:
        return lambda: number in cancelled

    for number in range(100):
        jobs.put(noted.job(number, is_cancelled=asks(number)))
    assert names(jobs.take()) == [0]
    cancelled.update(range(1, 99))
    assert taken(jobs) == [[99]]
    assert noted.dropped == dict.fromkeys(range(1, 99), "cancelled")


def test_what_is_late_is_dropped() -> None:
    now = [0.0]
    jobs, noted = Jobs(limit=9, clock=lambda: now[0]), Noted()
    jobs.put(noted.job("soon", deadline=1.0))
    jobs.put(noted.job("later", deadline=5.0))
    jobs.put(noted.job("whenever"))
    now[0] = 2.0
    assert taken(jobs) == [["later"], ["whenever"]]
    assert noted.dropped == {"soon": "late"}


def test_a_full_queue_refuses_but_forgets_first_whom_nobody_waits_for() -> None:
    jobs, noted = Jobs(limit=2), Noted()
    gone = [False]
    jobs.put(noted.job("a"))
    jobs.put(noted.job("b", is_cancelled=lambda: gone[0]))
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        jobs.put(noted.job("c"))
    gone[0] = True
    jobs.put(noted.job("d"))
    assert noted.dropped == {"b": "cancelled"}
    assert taken(jobs) == [["a"], ["d"]]


def test_jobs_of_a_group_are_run_together_as_far_as_they_fit() -> None:
    jobs, noted = Jobs(limit=100, max_width=4), Noted()
    for name, group, width in [
        ("a1", "a", 1),
        ("b1", "b", 1),
        ("a2", "a", 2),
        ("a3", "a", 2),
        ("a4", "a", 1),
        ("alone", None, 1),
        ("wide", "b", 9),
    ]:
        jobs.put(noted.job(name, group=group, width=width))
    assert taken(jobs) == [["a1", "a2", "a4"], ["b1"], ["a3"], ["alone"], ["wide"]]


def test_a_click_takes_no_hovers_along_and_companions_are_wanted_too() -> None:
    jobs, noted = Jobs(limit=100, max_width=8), Noted()
    jobs.put(noted.job("hover 1", group="a", priority=Priority.HOVER))
    jobs.put(noted.job("gone", group="a", priority=Priority.HOVER, is_cancelled=lambda: True))
    jobs.put(noted.job("hover 2", group="a", priority=Priority.HOVER))
    jobs.put(noted.job("click", group="a"))
    assert taken(jobs) == [["click"], ["hover 1", "hover 2"]]
    assert noted.dropped == {"gone": "cancelled"}


def test_taking_waits_for_a_job() -> None:
    jobs, noted = Jobs(limit=1), Noted()
    found: list[list[Any]] = []
    thread = threading.Thread(target=lambda: found.append(names(jobs.take())))
    thread.start()
    jobs.put(noted.job("a"))
    thread.join(10)
    assert found == [["a"]]
