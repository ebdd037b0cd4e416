"""The benchmark program: its command line, whose turn it is, what counts as the same result, and what it reports."""

import argparse
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from benchmarks import __main__ as program
from benchmarks import command_line, cores, cpu_inference, cpu_training, gpu, report
from benchmarks.contest import hold_contest
from benchmarks.inputs import write_inputs
from benchmarks.turns import Contender, Result, Unready, compare, measure, started, take_turns
from benchmarks.worker import seconds_per_call
from paths import ROOT
from poolformer_jax import PoolFormerConfig
from poolformer_jax.files import write_json

pytestmark = pytest.mark.usefixtures("optimised")
TINY = PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 8, 16, 16), num_labels=5)
OURS = "benchmarks.peers.ours"


def result(name, seconds, *, ours=False, share_a_cache=()):
    return Result(name, ours, tuple(seconds), 0.0, {}, 1, {}, tuple(share_a_cache))


class Recorder:
    """Takes its turns at once, and writes down that it did."""

    def __init__(self, name, turns):
        self.name, self.turns = name, turns

    def turn(self, seconds):
        self.turns.append(self.name)
        return seconds


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
    )


def test_help_lists_every_benchmark_within_80_columns():
    finished = run("--help")
    assert finished.returncode == 0
    for name, benchmark in program.BENCHMARKS.items():
        assert f"{name} " in finished.stdout
        assert benchmark.summary in finished.stdout
    assert "example:" in finished.stdout
    assert max(map(len, finished.stdout.splitlines())) <= 80


@pytest.mark.parametrize("name", program.BENCHMARKS)
def test_each_benchmark_explains_itself_with_an_example_and_where_its_figures_go(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        program.main([name, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert f"example:\n  python -m benchmarks {name} -" in told
    assert f"default: runs/benchmarks/{name}.json" in told


def test_the_command_of_a_report_repeats_it():
    flags = command_line.parser("gpu", None, "")
    flags.add_argument("--gpu")
    assert command_line.parse(flags, []).command == "python -m benchmarks gpu"
    assert command_line.parse(flags, ["--gpu", "NVIDIA L4"]).command == "python -m benchmarks gpu --gpu 'NVIDIA L4'"


def test_every_listed_benchmark_has_a_module():
    assert all((ROOT / "benchmarks" / f"{one.module}.py").exists() for one in program.BENCHMARKS.values())


@pytest.mark.parametrize("arguments", [[], ["cpu-inferense"]])
def test_wrong_names_are_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(arguments)
    assert ended.value.code == 2
    if arguments:
        told = capsys.readouterr().err
        assert "'cpu-inferense'" in told
        assert "cpu-inference, cpu-training" in told


def test_a_missing_package_is_named_with_what_brings_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "benchmarks.cpu_inference", raising=False)
    assert program.main(["cpu-inference"]) == 1
    told = capsys.readouterr().err
    assert "rich.console" in told
    assert "pip install -e '.[bench]'" in told


def test_everyone_has_one_turn_a_round_in_changing_order():
    turns = []
    names = ["a", "b", "c", "d"]
    found = take_turns({name: Recorder(name, turns) for name in names}, rounds=6, seconds=0.5)
    rounds = [tuple(turns[start : start + 4]) for start in range(0, 24, 4)]
    assert all(sorted(order) == names for order in rounds)
    assert len(set(rounds)) > 1
    assert found == {name: [0.5] * 6 for name in names}


def test_a_turn_is_filled_with_calls_and_the_first_one_does_not_count():
    now, calls = 0.0, 0

    def call():
        nonlocal now, calls
        calls += 1
        now += 100.0 if calls == 1 else 2.0

    assert seconds_per_call(call, 5.0, clock=lambda: now) == 2.0
    assert calls == 1 + 3


def test_a_call_longer_than_the_turn_counts_once():
    now = 0.0

    def call():
        nonlocal now
        now += 7.0

    assert seconds_per_call(call, 1.0, clock=lambda: now) == 7.0
    assert now == 14.0


def test_results_that_differ_are_an_error_with_all_differences():
    same, other = np.array([1.0, -4.0]), np.array([1.0, -3.0])
    assert compare({"a": same, "b": same + 4e-5}, 1e-4)["b"] == pytest.approx(1e-5)
    with pytest.raises(ValueError, match=r"different things.*at most 0\.1: a 0\.0e\+00, b 2\.5e-01"):
        compare({"a": same, "b": other}, 0.1)
    with pytest.raises(ValueError, match="different things"):
        compare({"a": same, "b": same * np.nan}, 0.1)
    with pytest.raises(ValueError, match="other shapes"):
        compare({"a": same, "b": same[:1]}, 0.1)


def test_ratios_are_of_the_same_round_and_to_the_fastest_peer():
    # The machine is ten times slower in the last round: ratios by round do not notice.
    found = [result("ours", [1, 1, 10], ours=True), result("fast", [2, 2, 20]), result("slow", [3, 3, 30])]
    ours, fast, slow = report.summarise(found, images=2)
    assert (ours["to_fastest_peer"], fast["to_fastest_peer"], slow["to_fastest_peer"]) == (0.5, 1, 1.5)
    assert ours["milliseconds_per_image"] == 500
    assert ours["middle_half"] == (500, 2750)  # quartiles of 500, 500, 5000


def test_of_peers_alike_the_one_that_was_ahead_in_most_rounds_is_the_fastest():
    # "steady" has the lower median, and is the slower of the two in two rounds of three.
    found = [result("ours", [1, 1, 10], ours=True), result("steady", [2, 2, 18]), result("other", [1.5, 2.1, 16])]
    ours, steady, other = report.summarise(found, images=1)
    assert (ours["to_fastest_peer"], steady["to_fastest_peer"], other["to_fastest_peer"]) == (0.625, 1.125, 1)


def test_turns_are_told_apart_by_whether_the_cores_shared_a_cache():
    found = [
        result("ours", [1, 3, 1], ours=True, share_a_cache=[True, False, True]),
        result("peer", [2, 2, 4], share_a_cache=[True, True, False]),
        result("elsewhere", [5, 5, 5], share_a_cache=[None] * 3),
    ]
    summaries = report.summarise(found, images=1)
    assert [one["cores_share_a_cache"] for one in summaries] == [1000, 2000, None]
    assert [one["cores_do_not"] for one in summaries] == [3000, 4000, None]
    console = Console(file=io.StringIO(), width=80)
    report.show(console, "title", summaries, {})
    assert "common" in console.file.getvalue()
    assert max(map(len, console.file.getvalue().splitlines())) <= 80


@pytest.mark.skipif(cores.rates() is None, reason="one core, or threads cannot be pinned")
def test_the_rates_between_cores_are_written_down(tmp_path):
    path = tmp_path / "exchange.json"
    assert program.main(["exchange", "--seconds", "0", "--json", str(path)]) == program.DONE
    found = json.loads(path.read_text())
    assert found["command"] == f"python -m benchmarks exchange --seconds 0 --json {path}"
    (group,) = found["groups"]
    assert group["times"] == 1
    assert group["same_core"] > 0
    assert group["other_core"] > 0


def test_the_table_fits_80_columns_and_marks_nobody_fastest_without_peers():
    found = [result("ours", [0.0123], ours=True), result("torch.compile, channels_last", [123.4])]
    console = Console(file=io.StringIO(), width=80)
    report.show(console, "s12, batch 1, float32, 2 cores", report.summarise(found, 1), {"b": "b: no such package"})
    told = console.file.getvalue()
    assert "torch.compile, channels_last" in told
    assert "12.3 to 12.3" in told
    assert "left out: b: no such package" in told
    assert max(map(len, told.splitlines())) <= 80
    (alone,) = report.summarise(found[:1], 1)
    assert alone["to_fastest_peer"] is None


def test_the_report_is_json_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "results" / "one.json"
    write_json(path, {"machine": report.machine(), "results": report.summarise([result("ours", [1.0])], 1)})
    assert json.loads(path.read_text())["results"][0]["milliseconds_per_image"] == 1000
    assert {"processor", "cores", "python", "date", "load_before"} <= json.loads(path.read_text())["machine"].keys()
    assert [file.name for file in path.parent.iterdir()] == ["one.json"]


def test_contenders_in_processes_of_their_own_are_compared_and_timed(tmp_path):
    write_inputs(tmp_path, TINY, batch=2, image_size=32)
    where = {"folder": str(tmp_path)}
    contenders = [
        Contender("ours", f"{OURS}:inference", where, ours=True, environment={"JAX_PLATFORMS": "cpu"}),
        Contender("again", f"{OURS}:inference", where, environment={"JAX_PLATFORMS": "cpu"}),
        Contender("absent", "benchmarks.peers.absent:inference", where),
    ]
    console = Console(file=io.StringIO(), width=80)
    options = argparse.Namespace(rounds=2, seconds=0.0)
    found = hold_contest(console, "tiny", contenders, options, images=2, tolerance=1e-6)
    ours, again = found["results"]
    assert (ours["name"], again["name"]) == ("ours", "again")
    assert all(len(one["seconds"]) == 2 and min(one["seconds"]) > 0 for one in (ours, again))
    assert again["difference"] == 0
    assert "No module named 'benchmarks.peers.absent'" in found["left_out"]["absent"]
    assert "left out: absent" in console.file.getvalue()
    with pytest.raises(ValueError, match="nothing to compare with"):
        measure(contenders[::2], rounds=1, seconds=0.0, tolerance=1e-6)


def test_our_training_contender_learns_the_labels(tmp_path):
    write_inputs(tmp_path, TINY, batch=2, image_size=32)
    options = {"folder": str(tmp_path), "adamw": {"learning_rate": 1e-2}, "steps": 4}
    with started(Contender("ours", f"{OURS}:training", options, environment={"JAX_PLATFORMS": "cpu"})) as worker:
        assert worker.result[-1] < worker.result[0]
        assert worker.told["versions"].keys() == {"poolformer_jax", "jax", "flax"}


def test_the_first_contender_must_start():
    with pytest.raises(Unready, match=r"ours: .*absent"):
        measure([Contender("ours", "absent:job", {}, ours=True)], rounds=1, seconds=0, tolerance=0)


def test_the_gpu_benchmark_refuses_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda _: None)
    assert program.main(["gpu"]) == 1
    assert "GPU" in capsys.readouterr().err


def test_the_use_of_a_gpu_is_operations_and_bytes_by_time():
    summary = {"seconds": [1.0, 2.0, 9.0], "facts": {"bytes_accessed": 6e12}}
    used = gpu.use(summary, flops=1e15, peak=gpu.Peak(flops=2e15, bandwidth=4e12))
    assert used == {"mfu": 0.25, "bandwidth": 3e12, "bandwidth_share": 0.75}
    assert gpu.use(summary, flops=1e15, peak=None)["mfu"] is None
    assert gpu.use({"seconds": [1.0], "facts": {}}, flops=1e15, peak=None)["bandwidth"] is None


@pytest.mark.live
@pytest.mark.parametrize("benchmark", [cpu_inference, cpu_training])
def test_our_contender_computes_what_pytorchs_do(benchmark, tmp_path):
    write_inputs(tmp_path, TINY, batch=2, image_size=64)
    contenders = [one for one in benchmark.contenders(tmp_path) if one.name in ("ours", "PyTorch")]
    results, left_out = measure(contenders, rounds=1, seconds=0.0, tolerance=benchmark.TOLERANCE)
    assert not left_out
    assert [one.name for one in results] == ["ours", "PyTorch"]
