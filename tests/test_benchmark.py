"""The commands: on a stub whose latencies are known, and on a real server."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import measure_performance
import measure_sensitivity
import numpy as np
import pytest
import stub_triton
from conftest import Exported
from PIL import Image

from triton_sam import cli
from triton_sam.benchmark import closed_loop, document, machine, plots, report, session, table
from triton_sam.benchmark.measure import Plan, interleave
from triton_sam.benchmark.record import Record, Series, Throughput, read_record, write_record
from triton_sam.benchmark.references import ONNXRUNTIME, PYTORCH
from triton_sam.benchmark.run import Run, Workload
from triton_sam.benchmark.server_stats import Watch, open_statistics
from triton_sam.benchmark.statistics import percentiles
from triton_sam.benchmark.subjects import Which
from triton_sam.demo import demo_repository
from triton_sam.protocol import Call
from triton_sam.server import EmbeddedServer
from triton_sam.specs import Family, Variant
from triton_sam.transport import Transport, open_transport

SMALL = ["--megapixels", "0.05", "--prompts", "1", "--masks", "1"]


def run(what: str, output: Path, *arguments: str) -> Record:
    assert cli.main(["benchmark", what, "-o", str(output), *SMALL, *arguments]) == 0
    return read_record(output / "benchmark.json")


class Ask:
    """A small request: what the stub waits is nearly all that there is to measure."""

    def __init__(self, transport: Transport, watch: Watch) -> None:
        self._transport = transport
        self._watch = watch
        points = {"point_coords": np.zeros((1, 1, 2), np.float32)}
        self._call = Call("sam2_decoder", points, ("iou_predictions",))

    def prepare(self, turn: int) -> None:
        self._watch.start()

    def run(self) -> None:
        self._transport.infer(self._call)

    def finish(self) -> Mapping[str, float]:
        return self._watch.stop().seconds()


def test_percentiles_are_those_that_the_server_was_told() -> None:
    # In steps, so that one answer that comes late on a busy machine changes no percentile.
    latencies = [*[150] * 40, *[190] * 6, *[260] * 2, *[360] * 2]
    random.Random(0).shuffle(latencies)
    plan = Plan(precision=0, warmup=0, max_rounds=len(latencies), pause_s=0)
    told = percentiles([value / 1e3 for value in latencies])
    for _ in range(4):
        with (
            stub_triton.running(latencies) as url,
            closing(open_transport(url)) as transport,
            closing(Watch(open_statistics(url), "sam2")) as watch,
        ):
            samples = interleave({"ask": Ask(transport, watch)}, plan)["ask"]
        found = Series("click", "", "", "subject", samples.seconds, True).percentiles
        # A busy machine keeps the stub waiting, which it says, or us: then it is asked again.
        given = percentiles([details["request"] for details in samples.details])
        agreed = pytest.approx(given, rel=0.02)
        if given["p50"] <= 1.02 * told["p50"] and found == agreed:
            break
    assert given["p50"] == pytest.approx(told["p50"], rel=0.1)
    assert all(value >= 0.999 * told[name] for name, value in given.items())
    assert found == agreed


@pytest.fixture(scope="module")
def clicked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``benchmark click`` on the same stub twice, and on one that is a tenth slower."""
    found = {}
    for name, latency in (("one", 100), ("two", 100), ("slow", 110)):
        found[name] = tmp_path_factory.mktemp(name)
        with stub_triton.running([latency]) as url:
            # Of a server so even that it is done long before; time for a machine that is not.
            options = ["--url", url, "--budget", "40", "--references", "none", "--precision", "1"]
            run("click", found[name], *options)
    return {name: folder / "benchmark.json" for name, folder in found.items()}


def test_two_runs_of_the_same_agree(
    clicked: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["benchmark", "compare", str(clicked["one"]), str(clicked["two"])]) == 0
    assert "0 slower, 0 faster, 2 the same." in capsys.readouterr().out


def test_a_server_that_is_a_tenth_slower_is_reported(
    clicked: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["benchmark", "compare", str(clicked["one"]), str(clicked["slow"])]) == 3
    assert "2 slower, 0 faster, 0 the same." in capsys.readouterr().out
    assert cli.main(["benchmark", "compare", str(clicked["slow"]), str(clicked["one"])]) == 0
    assert "0 slower, 2 faster, 0 the same." in capsys.readouterr().out


def test_a_click_on_the_stub_is_split_as_the_stub_counts_it(clicked: dict[str, Path]) -> None:
    series = read_record(clicked["one"]).of("click")["1 prompt, logits"][0]
    assert series.subject == "client, HTTP, embedding inline"
    assert 0.100 <= series.median.value < 0.120
    assert series.stages["compute"] == pytest.approx(0.100, rel=0.03)
    assert sum(series.stages.values()) == pytest.approx(series.median.value, rel=0.1)
    assert series.overhead_s == pytest.approx(series.median.value - 0.100, abs=0.003)
    assert series.wire is not None
    # One embedding, and what HTTP and JSON say about it; one mask, its score.
    assert 0 < series.wire["up"] - 4 * 256 * 64 * 64 < 2000
    assert 0 < series.wire["down"] - 4 * (256 * 256 + 1) < 2000


def test_clicks_of_all_kinds_are_about_one_encoded_image() -> None:
    plan = Plan(budget_s=4)
    with stub_triton.running([5]) as url, closing(open_statistics(url)) as statistics:
        target = session.Target(Which("sam2"), Path("none"), url)
        workload = Workload(megapixels=(0.05,), prompts=(1, 2), clients=3)
        record = session.measure(target, ["click", "hover", "throughput"], workload, plan, [])
        counted = statistics.read()["sam2_encoder"]
    assert counted.requests == 3  # two of them for the cold start
    assert [*record.of("click")] == [
        "1 prompt, logits",
        "2 prompts, logits",
        "1 prompt, mask at 0.05 MP",
    ]
    assert record.hovering[0].answered > 0
    assert [one.clients for one in record.throughput] == [1, 2, 3]
    assert all(one.rate > 0 and one.failures == 0 for one in record.throughput)


def test_what_a_slow_benchmark_takes_too_long_the_next_ones_lack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budgets: dict[str, float] = {}

    def taking(name: str, seconds: float) -> Callable[[Run, float], None]:
        def measure(run: Run, budget_s: float) -> None:
            budgets[name] = budget_s
            time.sleep(seconds)
            run.record.series.append(Series(name, "w", "client", "subject", [seconds] * 7, False))

        return measure

    listed = {name: session.Benchmark(taking(name, s), 0.5) for name, s in (("a", 3), ("b", 0))}
    monkeypatch.setattr(session, "BENCHMARKS", listed)
    with stub_triton.running([1]) as url:
        target = session.Target(Which("sam2"), Path("none"), url)
        workload = Workload(megapixels=(0.05,))
        record = session.measure(target, ["a", "b"], workload, Plan(budget_s=10), [])
    # What comes before them is part of the time too.
    assert 2 < budgets["a"] < 5
    assert budgets["b"] == pytest.approx(2 * budgets["a"] - 3, abs=0.3)
    assert any(note.startswith("Fewer than 8 rounds of a: w; b: w:") for note in record.notes)


def test_a_slow_encoder_gets_more_of_the_time() -> None:
    shares = {
        seconds: {name: one.share_of(seconds) for name, one in session.BENCHMARKS.items()}
        for seconds in (0.1, 0.5, 8.0)
    }
    assert shares[0.1] == shares[0.5]
    assert sum(shares[0.5].values()) == pytest.approx(1)
    assert shares[8.0]["encode"] == 4 * shares[0.5]["encode"]
    assert shares[8.0]["click"] == shares[0.5]["click"]


@pytest.fixture(scope="module")
def everything(
    server: EmbeddedServer, exported: Exported, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """``benchmark all`` on a real server, as short as it gets."""
    folder = tmp_path_factory.mktemp("all")
    options = ["--url", server.url, "--repository", str(exported.repository)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closed_loop, "_LONG_S", math.inf)  # nothing is left out for want of time
        run("all", folder, *options, "--budget", "16", "--clients", "2")
    return folder


def test_all_measures_everything_beside_its_references(everything: Path) -> None:
    record = read_record(everything / "benchmark.json")
    served, inline = "client, gRPC, embedding on the server", "client, gRPC, embedding inline"
    assert {series.benchmark for series in record.series} == {
        "encode",
        "click",
        "pipeline",
        "hover",
        "throughput",
    }
    for benchmark in ("encode", "pipeline"):
        for rivals in record.of(benchmark).values():
            assert [series.subject for series in rivals] == [served, ONNXRUNTIME, PYTORCH, inline]
            # Nobody finds an image encoded that another one sent.
            assert min(min(series.seconds) for series in rivals) > 0.2
    click = record.of("click")["1 prompt, logits"]
    assert [series.subject for series in click] == [served, ONNXRUNTIME, inline]
    assert click[0].wire is not None and click[2].wire is not None
    assert 100 < click[0].wire["up"] < 1000
    embedding = 4 * (256 * 64 * 64 + 32 * 256 * 256 + 64 * 128 * 128)
    assert 0 < click[2].wire["up"] - embedding < 0.01 * embedding
    assert list(click[0].stages) == ["client", "wire and server"]
    assert list(click[1].stages) == ["client", "compute"]
    assert list(click[2].stages) == [
        *("client", "wire", "queue", "input", "compute", "output", "server, other")
    ]
    assert record.hovering[0].executed is None
    hover = record.hovering[2]
    assert hover.answered + hover.cancelled + hover.dropped == hover.events
    assert hover.executed is not None  # what was dropped may have been run before that
    assert hover.answered <= hover.executed <= hover.answered + hover.dropped
    assert {(one.subject, one.clients) for one in record.throughput} == {
        (name, clients) for name in (served, ONNXRUNTIME, inline) for clients in (1, 2)
    }
    assert all(one.rate > 0 and one.failures == 0 for one in record.throughput)
    assert set(record.cold_start) >= {"first set_image", "first click"}
    assert [work["model"] for work in record.limits["models"]] == ["sam2_encoder", "sam2_decoder"]
    assert record.server["variant"] == "demo"
    assert record.server["precision"] == "fp32"
    assert record.command[0] == "triton-sam"


def test_pictures_and_the_report_are_there_and_whole(everything: Path) -> None:
    pictures = sorted(path.stem for path in everything.glob("*.png"))
    latencies = [f"{name}-latency" for name in ("click", "encode", "hover", "pipeline")]
    assert pictures == [*latencies, "stages", "throughput"]
    for path in everything.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 400
            assert len(set(picture.convert("P").tobytes())) > 5
    html = (everything / "report.html").read_text()
    assert html.count("data:image/png;base64,") == len(pictures)
    assert re.findall(r'(?:src|href)="(?!data:)', html) == []
    record = read_record(everything / "benchmark.json")
    for series in record.series:
        assert series.workload in html or series.benchmark == "throughput"
    assert "GFLOP" in html and "What the client does meanwhile" in html


def test_the_table_and_the_page_say_the_recorded_numbers(everything: Path, tmp_path: Path) -> None:
    stored = everything / "benchmark.json"
    record = read_record(stored)
    page = tmp_path / "performance.md"
    assert cli.main(["benchmark", "document", str(stored), "-o", str(page)]) == 0
    text, markdown = table.render(record), page.read_text()
    for series in record.series:
        if series.benchmark != "throughput":
            for value in series.percentiles.values():
                assert table.ms(value) in text and table.ms(value) in markdown
    assert "Stored in `benchmark.json`" in markdown
    assert record.machine["processor"] in markdown
    assert markdown == document.render([(stored, record)])


def test_notes_say_what_could_not_be_measured(clicked: dict[str, Path]) -> None:
    notes = " ".join(read_record(clicked["one"]).notes)
    assert "too few to compare" not in notes
    assert "perf_analyzer is not installed" in notes
    assert "No limits: model_repository/sam2_encoder/1/model.onnx is not there" in notes


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["click", "--url", "localhost:1", "--embedded"], 1, "--embedded starts one"),
        (["click", "--or-demo"], 1, "--or-demo is about what --embedded serves"),
        (["click", "--embedded", "--demo", "--variant", "tiny"], 1, "no variant 'tiny'"),
        (["click", "--megapixels", "1,x"], 2, "expected a number from 0.01 to 80, not 'x'"),
        (["click", "--references", "tensorrt"], 2, "onnxruntime, pytorch, inline"),
        (["throughput", "--clients", "0"], 2, "expected a whole number from 1 to 256"),
        (["compare", "no.json", "no.json"], 1, "No such file or directory: no.json"),
        (["click", "--embedded", "--repository", "none"], 1, "none"),
    ],
)
def test_wrong_command_lines(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        ended = cli.main(["benchmark", *arguments])
    except SystemExit as exc:
        ended = int(str(exc.code))
    error = capsys.readouterr().err
    assert ended == status
    assert message in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has the schema None"),
        (json.dumps({"schema": "triton-sam/benchmark/0"}), "has the schema 'triton-sam/bench"),
    ],
)
def test_files_that_are_no_record(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    assert cli.main(["benchmark", "compare", str(path), str(path)]) == 1
    assert message in capsys.readouterr().err


def record_with(series: Sequence[Series]) -> Record:
    where = {"processor": "P", "cores": 2, "memory_gib": 4, "gpus": [], "busy": 0.5}
    server = {"family": "sam2", "title": "SAM <2>", "variant": None, "address": "a"}
    return Record(["triton-sam"], "2026-01-01", where, {}, server, {}, series=list(series))


def test_a_report_escapes_what_it_shows() -> None:
    series = Series("click", "<b>", "client", "subject", [0.1] * 9, True)
    html = report.render(record_with([series]), {})
    assert "&lt;b&gt;" in html and "<b></h3>" not in html and "SAM &lt;2&gt;" in html


def test_a_report_shows_a_command_that_can_be_pasted() -> None:
    record = replace(record_with([]), command=["triton-sam", "--note", "two words"])
    assert "triton-sam --note &#39;two words&#39;" in report.render(record, {})


def test_pictures_of_few_and_equal_times() -> None:
    series = [Series("click", "w", name, "subject", [0.1], True) for name in ("a", "b")]
    for data in plots.draw(record_with(series)).values():
        Image.open(BytesIO(data)).verify()


def test_a_level_without_an_answer_is_shown_as_such() -> None:
    found = {"p50": 0.1, "p95": 0.2, "p99": 0.3}
    levels = [
        Throughput("client", "subject", "w", clients, rate, [rate], latencies, {}, failures)
        for clients, rate, latencies, failures in ((1, 10.0, found, 0), (2, 0.0, {}, 7))
    ]
    series = Series("throughput", "1 client", "client", "subject", [0.1], True)
    record = replace(record_with([series]), throughput=levels)
    html = report.render(record, plots.draw(record))
    assert "<td>2</td><td>0.0</td><td>–</td><td>–</td><td>–</td>" in html
    assert html.count("data:image/png;base64,") == 1


def test_sam3_is_prepared_once_and_measured_with_its_checkpoint_in_a_time_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed: list[tuple[str, ...]] = []
    series = Series("encode", "12 MP", "client", "subject", [24.0] * 9, True)

    def triton_sam(folder: Path, *arguments: str) -> None:
        typed.append(arguments)
        assert folder == tmp_path / "sam3-tracker"
        assert (folder / "sam3" / "config.json").is_file()
        if arguments[0] == "benchmark":
            (folder / "output").mkdir()
            write_record(record_with([series]), folder / "output" / "benchmark.json")
        else:
            for model in ("sam3_encoder", "sam3_decoder"):
                (folder / "model_repository" / model / "1").mkdir(parents=True)
                (folder / "model_repository" / model / "1/export.json").write_text('{"bytes": 1}')

    def make_apart(family: Family, variant: Variant, path: Path) -> None:
        assert (family.name, variant.model_cfg) == ("sam3", "facebook/sam3")
        path.mkdir()
        (path / "config.json").touch()

    def measure_performance_of_sam3(*arguments: str) -> int:
        folders = ["--models", str(tmp_path), "--checkpoints", str(tmp_path)]
        only = ["--only", "sam3:tracker", "--docs", str(tmp_path), *folders]
        monkeypatch.setattr(sys, "argv", ["measure_performance.py", *only, *arguments])
        return measure_performance.main()

    monkeypatch.setattr(measure_performance, "_triton_sam", triton_sam)
    monkeypatch.setattr(measure_performance, "make_apart", make_apart)
    with pytest.raises(SystemExit, match="no pair of sam3:tracker: run this with --prepare first"):
        measure_performance_of_sam3()
    for _ in range(2):
        assert measure_performance_of_sam3("--prepare") == 0
    assert measure_performance_of_sam3() == 0
    export, benchmark = typed
    assert export == (
        *("export", "sam3", "--variant", "tracker", "--default"),
        *("--checkpoint", "sam3", "--output", "model_repository"),
    )
    assert benchmark[:4] == ("benchmark", "all", "--model-type", "sam3")
    options = dict(zip(benchmark[5::2], benchmark[6::2], strict=True))
    assert benchmark[4] == "--embedded"
    assert options["--budget"] == "1000" and options["--megapixels"] == "12"
    assert options["--checkpoint"] == "sam3"
    assert "Random weights" in options["--note"] and options["-o"] == "output"
    parsed = cli.build_parser().parse_args(benchmark)
    # 24 s each for two images of the cold start, two of the limits, three of the clicks; then eight
    # rounds of both that are in every round, four of the third, one to throw away.
    share = session.BENCHMARKS["encode"].share_of(24)
    others = sum(session.BENCHMARKS[name].share_of(24) for name in ("click", "hover", "throughput"))
    assert parsed.masks == ()
    assert share / (share + others) * (1000 - 7 * 24) > (8 * 2 + 4 + 2) * 24
    stored = read_record(tmp_path / "benchmarks" / "sam3-tracker.json")
    assert stored.series == [series]
    assert "24000" in (tmp_path / "performance.md").read_text()


_ANSWER = """
import time
from triton_sam.predictor.messages import Request
from triton_sam.predictor.service import Predictor

class Answering(Predictor):
    def __init__(self):
        pass

    def _submit(self, request):
        time.sleep(0.2)
        self.worked = time.perf_counter()
        request.reply({})

predictor, started = Answering(), time.perf_counter()
predictor.submit(Request({}, frozenset(), lambda answer: None))
print((time.perf_counter() - started) / (predictor.worked - started))
"""


@pytest.mark.parametrize("slower", [0, 0.5])
def test_a_build_is_slowed_by_the_share_asked_for(slower: float, tmp_path: Path) -> None:
    measure_sensitivity.copy_package(tmp_path, slower)
    done = subprocess.run(
        [sys.executable, "-c", _ANSWER], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == pytest.approx(1 + slower, abs=0.1)


def test_without_a_pair_a_small_one_is_measured_and_that_is_said(
    tmp_path: Path, small: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the Pixi tasks do; the export itself is what :func:`small` did."""
    made: list[dict[str, object]] = []

    def export(family: Family, variant: str, checkpoint: Path, output: Path, **how: object) -> None:
        assert checkpoint.exists()
        made.append({"family": family.name, "variant": variant, **how})
        shutil.copytree(small(family.name).repository, output)

    def measure(target: session.Target, *rest: object) -> Record:
        targets.append(target)
        return record_with([series])

    targets: list[session.Target] = []
    series = Series("click", "w", "client", "subject", [0.1] * 9, True)
    monkeypatch.setattr("triton_sam.export.pipeline.export", export)
    monkeypatch.setattr(session, "measure", measure)
    options = ["--embedded", "--or-demo", "--repository", str(tmp_path)]
    for family in ("sam1", "sam2", "sam3"):
        run("all", tmp_path / "out", *options, "--model-type", family)
    run("all", tmp_path / "out", *options[:2], "--repository", str(small("sam1").repository))
    run("all", tmp_path / "out", *options[:2], "--repository", str(small("sam2").repository))
    assert made == [
        {"family": name, "variant": "small stand-in", "model_cfg": f"{name}_small.yaml"}
        | {"default": True}
        for name in ("sam1", "sam3")
    ]
    assert [len(target.notes) for target in targets] == [1, 0, 1, 0, 0]
    assert "Not SAM 3 itself: a small stand-in with random weights" in targets[2].notes[0]
    assert not targets[0].repository.exists()  # deleted with the run
    demo = demo_repository()
    assert [target.repository for target in targets[1::2]] == [demo, demo]
    assert targets[4].repository == small("sam2").repository


def test_on_a_machine_with_a_gpu_it_is_said_where_the_references_ran(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "_gpus", lambda: ["NVIDIA H200"])
    with stub_triton.running([1]) as url:
        target = session.Target(Which("sam2"), Path("none"), url)
        record = session.measure(target, [], Workload(megapixels=(0.05,)), Plan(), [])
    assert "The references in process ran on the processor, not on a GPU." in record.notes


def test_the_stored_page_is_made_of_the_stored_records(tmp_path: Path) -> None:
    docs = Path(__file__).parent.parent / "docs"
    stored = sorted((docs / "benchmarks").glob("*.json"))
    page = docs / "performance.md"
    assert page.exists() == bool(stored)
    if stored:
        (tmp_path / "benchmarks").symlink_to(docs / "benchmarks")
        measure_performance.write_page(tmp_path)
        assert (tmp_path / "performance.md").read_text() == page.read_text()
