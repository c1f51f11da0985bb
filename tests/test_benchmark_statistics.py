"""Percentiles, intervals and comparisons, against what is known of the samples."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from triton_sam.benchmark.compare import Change, circumstances, compare, render, slower
from triton_sam.benchmark.record import Record, Series
from triton_sam.benchmark.statistics import (
    autocorrelation,
    bootstrap,
    median_interval,
    percentiles,
)
from triton_sam.benchmark.table import ratio


def drifting(count: int, correlation: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """An autoregressive series of variance 1."""
    steps = generator.normal(size=count) * math.sqrt(1 - correlation**2)
    values = np.empty(count)
    values[0] = generator.normal()
    for index in range(1, count):
        values[index] = correlation * values[index - 1] + steps[index]
    return values


def test_percentiles_of_known_values() -> None:
    found = percentiles(range(101))
    assert found == {"p50": 50, "p90": 90, "p95": 95, "p99": 99}


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_the_interval_holds_the_median_as_often_as_it_says(correlation: float) -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        found = median_interval(list(10 + drifting(80, correlation, generator)))
        hits += found.low <= 10 <= found.high
    assert 0.92 <= hits / 400 <= 0.99


def test_the_interval_of_known_values() -> None:
    found = median_interval(np.random.default_rng(0).permutation(100).tolist())
    assert found.value == 49.5
    assert 38 <= found.low <= 41 and 58 <= found.high <= 61


@pytest.mark.parametrize("count", [1, 3, 5])
def test_few_values_have_an_open_interval(count: int) -> None:
    assert median_interval([1.0] * count).half_width == math.inf


def test_autocorrelation_of_drift_and_of_none() -> None:
    generator = np.random.default_rng(2)
    assert autocorrelation(drifting(4000, 0.7, generator)) == pytest.approx(0.7, abs=0.05)
    assert autocorrelation(generator.random(4000)) == pytest.approx(0, abs=0.05)
    assert autocorrelation(np.ones(10)) == 0


def test_the_block_bootstrap_knows_what_drift_does_to_a_mean() -> None:
    generator = np.random.default_rng(3)
    values = drifting(2000, 0.7, generator)
    spread = float(np.std(bootstrap([values], lambda rows: rows.mean(axis=-1))))
    expected = math.sqrt((1 + 0.7) / (1 - 0.7) / len(values))
    assert spread == pytest.approx(expected, rel=0.2)


def record_of(*series: Series) -> Record:
    return Record([], "", {}, {}, {"family": "sam2"}, {}, series=list(series))


def run_of(seed: int, factor: float = 1.0, machine: float = 1.0, client_s: float = 0.0) -> Record:
    """A run as they are: skewed times, drift that meets all alike, outliers of three times.

    ``client_s``: what the client's own code takes longer, in the served path and in the reference.
    """
    generator = np.random.default_rng(seed)
    drift = np.exp(0.03 * drifting(150, 0.9, generator))

    def times(median: float) -> list[float]:
        own = np.exp(0.06 * generator.normal(size=150))
        outliers = np.where(generator.random(150) < 0.03, 3.0, 1.0)
        return list(machine * median * drift * own * outliers)

    served, models = times(0.03 * factor), times(0.02)
    subject = Series("click", "1 prompt", "client", "subject", [s + client_s for s in served], True)
    reference = Series(
        *("click", "1 prompt", "in process", "reference"),
        seconds=[0.001 + s + client_s for s in models],
        precise=True,
        yardstick=models,
    )
    return record_of(subject, reference)


def verdict(changes: list[Change]) -> str:
    return next(change.verdict for change in changes if change.after.role == "subject")


def test_runs_without_a_change_agree() -> None:
    verdicts = [verdict(compare(run_of(2 * i), run_of(2 * i + 1))) for i in range(60)]
    assert verdicts.count("same") >= 59


@pytest.mark.parametrize(("factor", "expected"), [(1.10, "slower"), (1 / 1.10, "faster")])
def test_a_tenth_is_seen(factor: float, expected: str) -> None:
    verdicts = [verdict(compare(run_of(2 * i), run_of(2 * i + 1, factor))) for i in range(60)]
    assert verdicts.count(expected) >= 57


def test_a_slower_machine_is_no_slower_build() -> None:
    changes = compare(run_of(1), run_of(2, machine=1.25))
    assert verdict(changes) == "same" and slower(changes) == []
    text = render(changes)
    assert "The machine, its load or the client's code changed: in process moved too" in text
    slow = compare(run_of(1), run_of(2, factor=1.1, machine=1.25))
    assert [change.after.subject for change in slower(slow)] == ["client"]
    assert slower(slow)[0].ratio == pytest.approx(1.1, rel=0.03)


def test_a_slower_client_is_seen_though_the_reference_has_the_same_client() -> None:
    verdicts = [
        verdict(compare(run_of(2 * i), run_of(2 * i + 1, client_s=0.003))) for i in range(60)
    ]
    assert verdicts.count("slower") >= 57


def test_another_way_to_the_same_server_takes_nothing_out() -> None:
    def by_two_ways(seed: int, factor: float) -> Record:
        subject = run_of(seed, factor).series[0]
        return record_of(subject, replace(subject, subject="client, HTTP", role="reference"))

    changes = compare(by_two_ways(1, 1.0), by_two_ways(2, 1.1))
    assert [change.reference for change in changes] == [None, None]
    assert verdict(changes) == "slower"


@pytest.mark.parametrize("short", [0, 1])
def test_a_reference_of_other_rounds_takes_nothing_out(short: int) -> None:
    records = [run_of(1), run_of(2)]
    subject, reference = records[short].series
    cut = replace(reference, seconds=reference.seconds[1:], yardstick=reference.yardstick[1:])
    records[short] = record_of(subject, cut)
    change = compare(records[0], records[1])[0]
    assert change.reference is None
    assert change.ratio == pytest.approx(
        change.after.median.value / change.before.median.value, rel=1e-9
    )


def test_what_else_differs_is_said() -> None:
    one = replace(run_of(1), machine={"cores": 2}, versions={"numpy": "1"}, settings={"masks": 1})
    other = replace(
        one,
        machine={"cores": 4},
        versions={"numpy": "1", "torch": "2"},
        server={"family": "sam2", "precision": "fp16"},
    )
    assert circumstances(one, one) == []
    assert circumstances(one, other) == [
        "cores: 2 before, 4 after",
        "precision: None before, fp16 after",
        "torch: None before, 2 after",
    ]


def test_few_samples_do_not_tell() -> None:
    def short(record: Record) -> Record:
        return replace(record, series=[replace(s, seconds=s.seconds[:5]) for s in record.series])

    changes = compare(short(run_of(1)), short(run_of(2, 2.0)))
    assert {change.verdict for change in changes} == {"too few rounds"}
    assert "1 with too few rounds to tell" in render(changes)


def test_times_too_scattered_to_see_a_tenth_do_not_tell() -> None:
    def scattered(seed: int) -> Record:
        times = np.exp(0.4 * np.random.default_rng(seed).normal(size=30))
        return record_of(Series("click", "1 prompt", "client", "subject", list(times), False))

    change = compare(scattered(1), scattered(2))[0]
    assert change.low < 1 / 1.1 and change.high > 1.1
    assert change.verdict == "too few rounds"


def test_references_do_not_make_the_subjects_less_sure() -> None:
    one, other = run_of(1), run_of(2)
    alone = compare(record_of(one.series[0]), record_of(other.series[0]))[0]
    names = ("a", "b", "c")
    before, after = (
        record_of(
            run.series[0],
            *(replace(run.series[0], subject=name, role="reference") for name in names),
        )
        for run in (one, other)
    )
    beside = compare(before, after)
    assert (beside[0].low, beside[0].high) == (alone.low, alone.high)
    assert beside[1].low < beside[0].low and beside[1].high > beside[0].high


def test_a_ratio_is_of_the_rounds_that_both_took_part_in() -> None:
    reference = Series("click", "w", "in process", "reference", [1.0, 1.0, 9.0, 9.0, 9.0], True)
    served = replace(reference, subject="client", role="subject", seconds=[2.0, 2.0, 4.0, 4.0, 4.0])
    few = replace(reference, subject="PyTorch", seconds=[3.0, 3.0])
    rivals = [served, reference, few]
    assert [ratio(one, rivals) for one in rivals] == ["0.44", "1.00", "3.00"]


def test_series_that_only_one_record_has_are_left_out_and_named() -> None:
    before, after = run_of(1), run_of(2)
    renamed = [replace(series, workload="2 prompts") for series in after.series]
    other = replace(after, series=renamed)
    assert compare(before, other) == []
    assert circumstances(before, other) == [
        "click: 1 prompt · client: only before, not compared",
        "click: 1 prompt · in process: only before, not compared",
        "click: 2 prompts · client: only after, not compared",
        "click: 2 prompts · in process: only after, not compared",
    ]
