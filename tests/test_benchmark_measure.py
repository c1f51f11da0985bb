"""The harness: rounds, open loops, levels, bytes and operations, with times that are known."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import fakes
import numpy as np
import onnx
import pytest
import stub_triton
from conftest import Exported
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from triton_sam.benchmark import closed_loop, cold, gpu, openloop, perf_analyzer, references
from triton_sam.benchmark.closed_loop import Case
from triton_sam.benchmark.limits import measure_work
from triton_sam.benchmark.machine import Peak
from triton_sam.benchmark.measure import Plan, interleave, time_round
from triton_sam.benchmark.openloop import Burst, LatestWins, ServedPointer, hover
from triton_sam.benchmark.operations import Source, own
from triton_sam.benchmark.record import Record, typical_stages
from triton_sam.benchmark.run import Run, Workload
from triton_sam.benchmark.server_stats import Counters, HttpStatistics, Watch, parse
from triton_sam.benchmark.subjects import Subject, Which, open_background, served
from triton_sam.benchmark.sweep import Level, concurrency_levels, run_segment
from triton_sam.benchmark.wire import CountingProxy
from triton_sam.benchmark.workloads import clicks, mouse_path, photo
from triton_sam.client import SAM2TritonClient
from triton_sam.errors import InferenceError, InvalidInputError, SamError, ServerTimeoutError
from triton_sam.export import wrappers
from triton_sam.images import digest, load_image
from triton_sam.specs import Model, Tensor
from triton_sam.transport import Endpoint, TransportOptions


class Noted:
    """An operation that takes ``seconds`` and writes down when it was called."""

    def __init__(self, name: str, seconds: float, log: list[tuple[str, int]]) -> None:
        self.name, self.seconds, self.log = name, seconds, log
        self.turn = 0

    def prepare(self, turn: int) -> None:
        self.turn = turn

    def run(self) -> None:
        self.log.append((self.name, self.turn))
        time.sleep(self.seconds)

    def finish(self) -> Mapping[str, float]:
        return {"turn": self.turn}


def test_every_round_has_every_operation_in_an_order_of_its_own() -> None:
    log: list[tuple[str, int]] = []
    operations = {name: Noted(name, 0, log) for name in "abc"}
    plan = Plan(precision=0, warmup=2, max_rounds=20, pause_s=0)
    samples = interleave(operations, plan)
    timed = [log[i : i + 3] for i in range(6, len(log), 3)]
    assert [turn for _, turn in log[:6]] == [-2] * 3 + [-1] * 3
    assert [{turn for _, turn in part} for part in timed] == [{turn} for turn in range(20)]
    assert all(sorted(name for name, _ in part) == ["a", "b", "c"] for part in timed)
    assert len({tuple(name for name, _ in part) for part in timed}) > 2
    assert samples["a"].details == [{"turn": turn} for turn in range(20)]


def test_it_ends_when_the_median_is_sure() -> None:
    plan = Plan(budget_s=20, precision=0.5, warmup=0, min_rounds=10, pause_s=0)
    samples = interleave({"a": Noted("a", 0.01, [])}, plan)
    assert 10 <= len(samples["a"].seconds) <= 60


def test_it_ends_when_the_time_is_up() -> None:
    plan = Plan(budget_s=0.3, precision=0, warmup=1, pause_s=0)
    started = time.perf_counter()
    interleave({"a": Noted("a", 0.02, [])}, plan)
    assert 0.2 <= time.perf_counter() - started < 5


def test_no_round_begins_that_would_end_after_the_time() -> None:
    plan = Plan(budget_s=1, precision=0, warmup=0, pause_s=0)
    assert len(interleave({"a": Noted("a", 0.6, [])}, plan)["a"].seconds) == 1


def test_a_round_is_timed_though_the_warm_up_took_the_time() -> None:
    plan = Plan(budget_s=0.1, precision=0, warmup=3, pause_s=0)
    log: list[tuple[str, int]] = []
    samples = interleave({"a": Noted("a", 0.2, log)}, plan)
    assert log == [("a", -3), ("a", 0)]
    assert samples["a"].seconds == [pytest.approx(0.2, abs=0.15)]


def test_a_case_of_long_operations_gets_as_many_rounds_as_one_of_short_ones() -> None:
    log: list[tuple[str, int]] = []
    subject = Subject("a", "subject", SAM2TritonClient("localhost:1"))
    long, short = Noted("long", 0.3, log), Noted("short", 0.03, log)

    def cases(run: Run) -> Iterator[Case]:
        yield Case("click", "short", lambda subject: short, [subject])
        yield Case("click", "long", lambda subject: long, [subject])

    record = Record([], "", {}, {}, {}, {})
    run = Run(Which("sam2"), record, [subject], Workload(), Plan(precision=0))
    closed_loop.measure(run, 5, cases)
    found = {series.workload: len(series.seconds) for series in run.record.series}
    # Of 5 s a third of a second for the first rounds, a fifth for bytes and profile, and two more
    # rounds of a warm-up.
    assert 5 <= found["long"] <= 10
    assert found["long"] / 2 <= found["short"] <= 2 * found["long"]
    # The first rounds alone take longer than this: they count.
    record.series.clear()
    log.clear()
    closed_loop.measure(run, 0.2, cases)
    assert [len(series.seconds) for series in record.series] == [1, 1]
    timed = [name for name, turn in log if turn < 0]
    assert timed == ["short", "long", "long"]


def test_a_slow_first_click_leaves_the_other_references_their_rounds() -> None:
    """Only where every click is slow are they in three rounds, not in 48."""
    slow = {"cold": [0.3, *[0.01] * 99], "slow": [0.3] * 99}

    class Cooling(Noted):
        def run(self) -> None:
            self.seconds = slow[self.name].pop(0)
            super().run()

    client = SAM2TritonClient("localhost:1")
    subjects = [Subject(name, "subject", client) for name in "abc"]
    begun = {}
    for name in slow:
        operation = Cooling(name, 0, [])
        case = Case("click", name, partial(lambda one, _: one, operation), subjects)
        begun[name] = closed_loop._begin(case, 0).few
    assert begun == {"cold": {"c": 48}, "slow": {"c": 3}}


def test_some_take_part_in_the_first_rounds_only() -> None:
    log: list[tuple[str, int]] = []
    operations = {name: Noted(name, 0, log) for name in "abc"}
    plan = Plan(precision=0, warmup=0, max_rounds=6, pause_s=0)
    samples = interleave(operations, plan, few={"b": 2, "c": 3})
    assert {name: len(found.seconds) for name, found in samples.items()} == {"a": 6, "b": 2, "c": 3}
    assert [found["turn"] for found in samples["c"].details] == [0, 1, 2]


def test_a_round_that_is_over_may_count() -> None:
    operations = {"a": Noted("a", 0.01, [])}
    plan = Plan(precision=0, warmup=5, max_rounds=4, pause_s=0)
    samples = interleave(operations, plan, first=time_round(operations))
    assert [found["turn"] for found in samples["a"].details] == [-100, 1, 2, 3]


def test_what_there_is_no_time_for_is_left_out_and_said() -> None:
    client = SAM2TritonClient("localhost:1")
    subjects = [Subject(name, "subject", client) for name in ("served", "in process", "PyTorch")]
    log: list[tuple[str, int]] = []

    def cases(run: Run) -> Iterator[Case]:
        for title, needed in (("1 MP", True), ("12 MP", False)):
            yield Case(
                *("encode", title, lambda subject: Noted(subject.name, 0, log), subjects),
                encodes=True,
                needed=needed,
            )

    def measured(encode_s: float) -> tuple[dict[str, list[str]], list[str]]:
        record = Record([], "", {}, {}, {}, {})
        plan = Plan(precision=0, max_rounds=2)
        run = Run(Which("sam2"), record, subjects, Workload(), plan, encode_s=encode_s)
        closed_loop.measure(run, 15, cases)
        found = {
            workload: [series.subject for series in rivals]
            for workload, rivals in record.of("encode").items()
        }
        return found, run.left_out

    everybody = ["served", "in process", "PyTorch"]
    assert measured(0.5) == ({"1 MP": everybody, "12 MP": everybody}, [])
    some = everybody[:2]
    assert measured(1) == (
        {"1 MP": some, "12 MP": some},
        ["PyTorch (encode: 1 MP)", "PyTorch (encode: 12 MP)"],
    )
    assert measured(10) == ({"1 MP": some}, ["PyTorch (encode: 1 MP)", "encode: 12 MP"])


def test_no_run_sends_the_files_of_another() -> None:
    first, second = own(b"file"), own(b"file")
    assert first.startswith(b"file") and first != second
    # A server that runs on still has the images of the run before.
    assert abs(int.from_bytes(second[4:], "big") - time.time_ns()) < 86_400e9


def test_latencies_of_a_burst_count_from_when_an_event_was_due() -> None:
    burst = Burst([0, 0.1, 0.2, 0.3], [(0, 0.05), (3, 0.5)], cancelled=2, dropped=0, late_s=0)
    assert burst.latencies == pytest.approx([0.05, 0.4, 0.3, 0.2])
    assert burst.last == pytest.approx(0.2)


def test_a_stall_of_the_server_is_seen_by_every_event_that_was_due_meanwhile() -> None:
    rate, stall_s, events = 50, 0.8, 100
    with stub_triton.running([5], stall=(20, stall_s)) as url, SAM2TritonClient(url) as client:
        client.set_image(photo(0.05).image)
        # As the older way has it: the next request waits for the last one's answer.
        closed = []
        for _ in range(40):
            started = time.perf_counter()
            client.predict([[1, 1]], [1])
            closed.append(time.perf_counter() - started)
    with stub_triton.running([5], stall=(20, stall_s)) as url, SAM2TritonClient(url) as client:
        client.set_image(photo(0.05).image)
        path = mouse_path(events, (200, 200), 0)
        burst = hover(LatestWins(lambda at: client.predict([at], [1])), path, rate)
    assert sum(value > stall_s / 2 for value in closed) == 1
    slow = [value for value in burst.latencies if value > stall_s / 2]
    # Half of the 40 events that were due during the stall, and not one request.
    assert 17 <= len(slow) <= 30
    assert 0.95 * stall_s <= max(slow) <= 1.4 * stall_s
    assert np.percentile(burst.latencies, 90) > 0.5 * stall_s > np.percentile(closed, 90)
    assert burst.cancelled == events - len(burst.done) >= stall_s * rate - 5
    assert burst.done[-1][0] == events - 1


def test_an_error_of_a_hover_reaches_the_caller() -> None:
    def fail(position: tuple[float, float]) -> None:
        raise InferenceError("no")

    with pytest.raises(InferenceError, match="no"):
        hover(LatestWins(fail), [(0, 0), (1, 1)], 100)


def test_the_clients_own_hover_is_measured_the_same_way() -> None:
    with stub_triton.running([40]) as url, open_background(url, Which("sam2")) as client:
        embedding = client.encode(photo(0.05).image)
        burst = hover(ServedPointer(client, embedding), mouse_path(30, (200, 200), 0), 60)
    assert burst.done[-1][0] == 29
    assert burst.cancelled + len(burst.done) == 30 and burst.cancelled >= 10
    assert burst.last >= 0.040
    assert min(burst.latencies) >= 0.039


def test_an_error_of_the_clients_own_hover_reaches_the_caller() -> None:
    with stub_triton.running([5]) as url, open_background(url, Which("sam2")) as client:
        embedding = replace(client.encode(photo(0.05).image), family="sam1")
        with pytest.raises(SamError, match="sam1"):
            hover(ServedPointer(client, embedding), [(1, 1), (2, 2)], 60)


def test_a_hover_without_a_last_mask_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openloop, "_TIMEOUT_S", 0.2)
    message = r"No mask for the last position within 0\.2 s"
    forever = threading.Event()
    with pytest.raises(ServerTimeoutError, match=message):
        hover(LatestWins(lambda at: forever.wait()), [(0, 0), (1, 1)], 100)
    forever.set()
    with stub_triton.running([800]) as url, open_background(url, Which("sam2")) as client:
        embedding = client.encode(photo(0.05).image)
        with pytest.raises(ServerTimeoutError, match=message):
            hover(ServedPointer(client, embedding), [(1, 1), (2, 2)], 60)


@pytest.mark.parametrize(
    ("most", "levels"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_concurrency_levels(most: int, levels: list[int]) -> None:
    assert concurrency_levels(most) == levels


def test_a_level_counts_answers_and_failures() -> None:
    lock = threading.Lock()

    def one_at_a_time(turn: int) -> None:
        with lock:
            time.sleep(0.01)
        if turn == 3:
            raise InferenceError("no")

    level = Level(2)
    run_segment([one_at_a_time] * 2, 0.5, level)
    assert level.failures == 2
    assert 30 < level.rates[0] <= 100
    # Little's law: both clients wait all the time.
    assert level.rates[0] * np.mean(level.seconds) == pytest.approx(2, rel=0.15)


def test_the_proxy_counts_every_byte() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                assert len(connection.recv(100_000, socket.MSG_WAITALL)) == 100_000
                connection.sendall(b"x" * 70_000)

        thread = threading.Thread(target=answer)
        thread.start()
        endpoint = Endpoint("http", "127.0.0.1", listener.getsockname()[1])
        with CountingProxy(endpoint) as proxy:
            target = Endpoint.parse(proxy.url)
            with socket.create_connection((target.host, target.port)) as client:
                client.sendall(b"y" * 100_000)
                assert len(client.recv(70_000, socket.MSG_WAITALL)) == 70_000
            assert (proxy.total.up, proxy.total.down) == (100_000, 70_000)
        thread.join()


STATISTICS = {
    "model_stats": [
        {
            "name": name,
            "version": version,
            "execution_count": 3,
            "inference_stats": {
                "success": {"count": "4", "ns": "1000"},
                "fail": {"count": 1, "ns": 5},
                "queue": {"count": 4, "ns": 100},
                "compute_input": {"count": 4, "ns": 50},
                "compute_infer": {"count": 4, "ns": 700},
                "compute_output": {"count": 4, "ns": 60},
            },
        }
        for name, version in (("sam2_decoder", "1"), ("sam2_decoder", "2"), ("other", "1"))
    ]
}


def test_statistics_are_summed_over_versions() -> None:
    found = parse(STATISTICS)
    assert found["sam2_decoder"] == Counters(8, 2, 6, 2000, 200, 100, 1400, 120)
    assert found["other"].seconds()["compute"] == pytest.approx(7e-7)


def test_a_watch_waits_for_the_count_and_leaves_other_families_out() -> None:
    answers = [Counters(), Counters(), Counters(), Counters(requests=1, request_ns=5)]

    class Source:
        def read(self) -> Mapping[str, Counters]:
            now = answers.pop(0)
            return {"sam2_decoder": now, "sam1_decoder": Counters(requests=99)}

        def close(self) -> None: ...

    watch = Watch(Source(), "sam2")
    watch.start()
    assert watch.stop() == Counters(requests=1, request_ns=5)


def test_a_reference_that_does_not_fit_into_memory_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, gb = Which("sam2").family, 10**9
    for model, size in ((family.encoder, gb), (family.decoder, 0)):
        folder = tmp_path / model.name / "1"
        folder.mkdir(parents=True)
        (folder / model.file).touch()
        with (folder / f"{model.file}_data").open("wb") as file:
            file.truncate(size)
    opened: list[str] = []

    def opening(name: str) -> object:
        def make(*args: object) -> AbstractContextManager[str]:
            opened.append(name)
            return nullcontext(name)

        return make

    for name in ("onnxruntime", "pytorch", "served"):
        monkeypatch.setattr(references, name, opening(name))
    monkeypatch.setattr(references, "available_memory", lambda: 7 * gb)
    names = references.NAMES
    with references.open_references(names, Which("sam2"), tmp_path, "", ["url"], None) as answer:
        found, reasons = answer
    assert [str(subject) for subject in found] == ["onnxruntime", "served"]
    assert reasons == [
        "No reference pytorch: it takes about 3.1 GB of memory, and 1.9 GB are free."
    ]
    assert opened == ["onnxruntime", "served"]


def described(root: Path, **manifest: object) -> None:
    folder = root / "sam1_encoder" / "1"
    folder.mkdir(parents=True)
    (folder / "export.json").write_text(json.dumps(manifest))


def test_the_official_predictor_gets_the_checkpoint_that_the_pair_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = Path("checkpoints/sam1.pth")
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"weights")
    was = {"file": "sam1.pth", "sha256": hashlib.sha256(b"weights").hexdigest()}
    described(tmp_path, model_cfg="vit_b", checkpoint=was)
    built: list[object] = []

    class Wrapper:
        def build_model(self, cfg: str, weights: Path) -> None:
            built.append((cfg, weights))

        def predictor(self, model: None) -> None: ...

    monkeypatch.setattr(wrappers, "WRAPPERS", {"sam1": Wrapper()})
    with references.pytorch(tmp_path, Which("sam1")) as subject:
        assert subject.full_size_only
    assert built == [("vit_b", checkpoint)]
    checkpoint.write_bytes(b"other weights")
    with pytest.raises(references.Unavailable, match="a SAM 1 pair cannot be read back; name"):
        references.pytorch(tmp_path, Which("sam1")).__enter__()


def test_the_official_predictor_of_each_family_answers(each: Exported) -> None:
    image = fakes.photo(120, 90)
    ours = references.OfficialPredictor(each.repository, Which(each.name), each.checkpoint)
    theirs = each.predictor()
    ours.set_image(image)
    theirs.set_image(Image.fromarray(image))
    masks, scores, logits = ours.predict([[40, 50]], [1])
    prompt = {"point_coords": np.array([[40, 50]]), "point_labels": np.array([1])}
    wanted = theirs.predict(**prompt, multimask_output=False)
    for mine, official in zip((masks, scores, logits), wanted, strict=True):
        np.testing.assert_array_equal(mine, official)


def test_the_weights_of_small_pairs_of_other_families_are_not_looked_for(tmp_path: Path) -> None:
    described(tmp_path, model_cfg="sam1_small.yaml")
    with pytest.raises(references.Unavailable, match="with --checkpoint"):
        references.pytorch(tmp_path, Which("sam1")).__enter__()


def test_requests_of_others_are_not_taken_for_our_own() -> None:
    with (
        stub_triton.running([1]) as url,
        closing(Watch(HttpStatistics(Endpoint.parse(url), 5), "sam2")) as watch,
        served(url, Which("sam2"), watch) as subject,
        SAM2TritonClient(url) as other,
    ):
        subject.start()
        subject.segmenter.set_image(photo(0.05).image)
        assert set(subject.stages()) == {
            *("transport", "request", "queue", "input", "compute", "output")
        }
        subject.start()
        subject.segmenter.set_image(photo(0.05).image)
        other.set_image(photo(0.05).image)
        assert set(subject.stages()) == {"transport"}


def test_statistics_over_http() -> None:
    with stub_triton.running([1]) as url, SAM2TritonClient(url) as client:
        client.set_image(photo(0.05).image)
        with closing(Watch(HttpStatistics(Endpoint.parse(url), 5), "sam2")) as watch:
            watch.start()
            client.predict([[1, 1]], [1])
            assert watch.stop().requests == 1


def test_photos_have_the_size_asked_for_and_differ_each_turn() -> None:
    made = photo(0.5)
    assert made.image.width * made.image.height == pytest.approx(500_000, rel=0.01)
    assert made.title == "0.5 MP"
    files = [made.jpeg(turn) for turn in (0, 1, 0)]
    assert files[0] == files[2]
    first, second = (load_image(file) for file in files[:2])
    assert digest(first) != digest(second)
    assert first.crop((30, 0, *first.size)).tobytes() == second.crop((30, 0, *first.size)).tobytes()
    with pytest.raises(InvalidInputError, match=r"0\.01 to 80 megapixels; got 100"):
        photo(100)


def test_prompts_lie_in_the_image_and_can_be_repeated() -> None:
    made = clicks(10, (300, 200), 5)
    points = np.array(made.points)
    assert points.shape == (10, 1, 2)
    assert (points > 0).all() and (points < (300, 200)).all()
    assert made == clicks(10, (300, 200), 5) != clicks(10, (300, 200), 6)
    assert clicks(10, (300, 200), -100_000) != clicks(10, (300, 200), -100_001)
    path = np.array(mouse_path(60, (300, 200), 1))
    assert (path > 0).all() and (path < (300, 200)).all()
    assert 0 < np.abs(np.diff(path, axis=0)).max() < 20


def write_known(path: Path) -> Model:
    """A graph whose operations can be counted by hand."""

    def weights(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(np.ones(shape, np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "w2"], ["b"], group=8),
        helper.make_node("ConvTranspose", ["b", "w3"], ["c"], strides=[2, 2]),
        helper.make_node("MatMul", ["c", "w4"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "known",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 32, 5])],
        [
            weights("w1", 8, 3, 3, 3),
            weights("w2", 8, 1, 1, 1),
            weights("w3", 8, 4, 2, 2),
            weights("w4", 32, 5),
        ],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return Model("known", (Tensor("x", (-1, 3, 16, 16)),), (Tensor("y", (-1, 4, 32, 5)),))


def test_operations_and_bytes_of_a_known_graph(tmp_path: Path) -> None:
    model = write_known(tmp_path / "known.onnx")
    work = measure_work(tmp_path / "known.onnx", model)
    convolutions = 2 * 256 * 8 * 27 + 2 * 256 * 8 + 2 * 256 * 8 * 4 * 4
    assert work.flops == convolutions + 2 * 4 * 32 * 32 * 5
    assert work.weight_bytes == 4 * (8 * 27 + 8 + 8 * 4 * 4 + 32 * 5)
    assert work.io_bytes == 4 * (3 * 256 + 4 * 32 * 5)
    assert sum(work.by_operator.values()) == pytest.approx(1, abs=0.01)
    bounds = work.bounds(Peak(gflops=1, gbytes=0.001))
    assert bounds["operations"] == pytest.approx(work.flops / 1e9)
    assert bounds["bytes"] == pytest.approx((work.weight_bytes + work.io_bytes) / 1e6)


def test_a_cold_start_may_take_as_long_as_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(photo(0.05))
    with stub_triton.running([150]) as url:
        steps = cold.cold_start(url, Which("sam2"), source)
        assert list(steps) == ["first set_image", "first click", "second set_image", "second click"]
        assert 0.15 <= steps["second click"] < 5
        monkeypatch.setattr(cold, "OPTIONS", TransportOptions(timeout_s=0.1))
        with pytest.raises(ServerTimeoutError, match=r"0\.1"):
            cold.cold_start(url, Which("sam2"), source)


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_gpu_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "NVIDIA H200, 40, 1000, 200.5\nNVIDIA H200, 60, 3000, 300.5\nNVIDIA T4, [N/A], 1, 2\n"
    program(tmp_path, "nvidia-smi", f"printf '{rows}'; exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with gpu.GpuSampler() as sampler:
        deadline = time.monotonic() + 5
        while not sampler.summary() or sampler.summary()[0]["utilisation_mean"] < 50:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert sampler.summary() == [
        {
            "name": "NVIDIA H200",
            "utilisation_mean": 50,
            "utilisation_max": 60,
            "memory_max_mib": 3000,
            "power_mean_w": 250.5,
        }
    ]


def test_without_a_gpu_nothing_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with gpu.GpuSampler() as sampler:
        pass
    assert sampler.summary() == []


CSV = (
    "Concurrency,Inferences/Second,Client Send,p50 latency,p90 latency,p95 latency,p99 latency\n"
    "1,20.5,120,48000,52000,53000,61000\n"
)


def test_perf_analyzer_is_a_second_opinion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sample.csv").write_text(CSV)
    script = f'echo "$@" > {tmp_path}/said; for last; do :; done; cat {tmp_path}/sample.csv > $last'
    program(tmp_path, "perf_analyzer", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with stub_triton.running([10]) as url:
        found = perf_analyzer.cross_check(url, stub_triton.FAMILY, 0.2)
    assert found is not None
    assert found.theirs == {"p50": 0.048, "p90": 0.052, "p95": 0.053, "p99": 0.061}
    assert found.ours["p50"] >= 0.01
    said = (tmp_path / "said").read_text()
    assert "-m sam2_decoder -u 127.0.0.1:" in said
    assert "-i http --concurrency-range 1:1" in said
    assert "--shape image_embeddings:1,256,64,64 --shape point_coords:1,1,2" in said
    assert "--shape high_res_feats_0:1,32,256,256" in said


def test_without_perf_analyzer_there_is_no_second_opinion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert perf_analyzer.cross_check("localhost:1", stub_triton.FAMILY, 1) is None


def test_stages_of_the_typical_operation_add_up() -> None:
    server = {"request": 0.05, "queue": 0.01, "input": 0.002, "compute": 0.03, "output": 0.003}
    rows = [{"total": total, "transport": 0.07, **server} for total in (0.08, 0.10, 0.09, 5.0)]
    stages = typical_stages(rows)
    assert stages == pytest.approx(
        {
            "client": 0.025,
            "wire": 0.02,
            "queue": 0.01,
            "input": 0.002,
            "compute": 0.03,
            "output": 0.003,
            "server, other": 0.005,
        }
    )
    assert typical_stages(rows[:2])["client"] == pytest.approx(0.02)
    assert typical_stages([*rows, {"total": 0.09, "transport": 0.08}]) == stages
    assert typical_stages([{"total": 0.1, "transport": 0.08}]) == pytest.approx(
        {"client": 0.02, "wire and server": 0.08}
    )
    in_process = {"total": 0.1, "transport": 0.08, "compute": 0.08}
    assert typical_stages([in_process]) == pytest.approx({"client": 0.02, "compute": 0.08})
    assert typical_stages([{"total": 0.1}]) == {"in process": 0.1}
