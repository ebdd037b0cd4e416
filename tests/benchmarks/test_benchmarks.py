"""The benchmark program: command line, turns, comparison of results, and reports."""

import argparse
import io
import json

import numpy as np
import pytest
from rich.console import Console

from benchmarks import (
    __main__ as program,
    command_line,
    convert,
    cpu_inference,
    cpu_training,
    gpu,
    input_pipeline,
    report,
)
from benchmarks.comparison import (
    BenchmarkError,
    Implementation,
    check_agreement,
    compare,
    measure,
    started,
    take_turns,
)
from benchmarks.compiled import tpu_chips
from benchmarks.inputs import write_inputs
from benchmarks.report import Result
from benchmarks.worker import seconds_per_call
from paths import ROOT
from poolformer_jax import PoolFormerConfig
from poolformer_jax.errors import InputError
from poolformer_jax.files import write_json
from poolformer_jax.process import FAILED
from poolformer_jax.version import __version__

pytestmark = pytest.mark.usefixtures("optimised")
TINY = PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 8, 16, 16), num_labels=5)
OURS = "benchmarks.peers.ours"
CPU = {"JAX_PLATFORMS": "cpu"}


def result(name, seconds, *, ours=False):
    return Result(name, ours, tuple(seconds), 0.0, {}, 1, {})


class Recorder:
    """Returns at once and records that it had a turn."""

    def __init__(self, name, turns):
        self.name, self.turns = name, turns

    def turn(self, seconds):
        self.turns.append(self.name)
        return seconds


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=80)


def test_help_lists_every_benchmark_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for name, benchmark in program.BENCHMARKS.items():
        assert f"{name} " in printed
        assert benchmark.summary in printed
        assert (ROOT / "benchmarks" / f"{benchmark.module}.py").exists()
    assert "example:" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"poolformer-jax {__version__}\n")


@pytest.mark.parametrize("name", program.BENCHMARKS)
def test_help_of_a_benchmark_has_an_example_and_says_where_json_goes(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        program.main([name, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"example:\n  python -m benchmarks {name} -" in printed
    assert f"default: runs/benchmarks/{name}.json" in printed


def test_a_report_records_the_command_that_repeats_it():
    parser = command_line.make_parser("gpu", None, "")
    parser.add_argument("--gpu")
    assert command_line.parse(parser, []).command == "python -m benchmarks gpu"
    assert command_line.parse(parser, ["--gpu", "NVIDIA L4"]).command == "python -m benchmarks gpu --gpu 'NVIDIA L4'"


@pytest.mark.parametrize("arguments", [[], ["cpu-inferense"]])
def test_a_wrong_name_is_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(arguments)
    assert ended.value.code == 2
    if arguments:
        printed = capsys.readouterr().err
        assert "'cpu-inferense'" in printed
        assert "cpu-inference, cpu-training" in printed


def test_a_missing_package_is_named_with_the_extra_that_installs_it(monkeypatch, capsys):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'rich.console'", name="rich.console")

    monkeypatch.setattr(program.importlib, "import_module", import_module)
    assert program.main(["cpu-inference"]) == FAILED
    printed = capsys.readouterr().err
    assert "rich.console" in printed
    assert "pip install -e '.[bench]'" in printed


def test_a_missing_tpu_compiler_is_named_with_the_extra_that_installs_it(monkeypatch, capsys):
    from benchmarks import tpu

    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda _: None)
    assert program.main(["tpu"]) == FAILED
    assert "pip install -e '.[train,tpu]'" in capsys.readouterr().err
    assert program.main(["tpu", "--peer", "torchax", "--plain"]) == FAILED
    assert "--plain and --no-kernels change our network" in capsys.readouterr().err


def test_an_unknown_chip_is_named_with_the_known_ones():
    with pytest.raises(InputError, match=r"'v9:4x4'.*v5e.*v6e"):
        tpu_chips.chip_of("v9:4x4")


def test_every_implementation_has_one_turn_per_round_in_changing_order():
    turns = []
    names = ["a", "b", "c", "d"]
    times = take_turns({name: Recorder(name, turns) for name in names}, rounds=6, seconds=0.5)
    rounds = [tuple(turns[start : start + 4]) for start in range(0, 24, 4)]
    assert all(sorted(order) == names for order in rounds)
    assert len(set(rounds)) > 1
    assert times == {name: [0.5] * 6 for name in names}


def test_calls_fill_a_turn_and_the_first_call_does_not_count():
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


def test_results_that_differ_are_an_error_that_lists_all_differences():
    same, other = np.array([1.0, -4.0]), np.array([1.0, -3.0])
    assert check_agreement({"a": same, "b": same + 4e-5}, 1e-4)["b"] == pytest.approx(1e-5)
    with pytest.raises(BenchmarkError, match=r"at most 0\.1.*a 0\.0e\+00, b 2\.5e-01"):
        check_agreement({"a": same, "b": other}, 0.1)
    with pytest.raises(BenchmarkError, match="Results differ"):
        check_agreement({"a": same, "b": same * np.nan}, 0.1)
    with pytest.raises(BenchmarkError, match="shape"):
        check_agreement({"a": same, "b": same[:1]}, 0.1)


def test_ratios_are_within_a_round_and_to_the_fastest_other_library():
    # The machine is ten times slower in the last round, which must not change the ratios.
    results = [result("ours", [1, 1, 10], ours=True), result("fast", [2, 2, 20]), result("slow", [3, 3, 30])]
    ours, fast, slow = report.summarise(results, images=2)
    assert (ours["to_fastest_peer"], fast["to_fastest_peer"], slow["to_fastest_peer"]) == (0.5, 1, 1.5)
    assert ours["milliseconds_per_image"] == 500
    assert ours["middle_half"] == (500, 2750)  # quartiles of 500, 500, 5000


def test_the_fastest_other_library_is_faster_in_most_rounds():
    # "steady" has the lower median, but "other" is faster in two of three rounds.
    results = [result("ours", [1, 1, 10], ours=True), result("steady", [2, 2, 18]), result("other", [1.5, 2.1, 16])]
    ours, steady, other = report.summarise(results, images=1)
    assert (ours["to_fastest_peer"], steady["to_fastest_peer"], other["to_fastest_peer"]) == (0.625, 1.125, 1)


def test_a_comparison_fits_80_columns_one_line_per_implementation(console):
    names = [implementation.name for implementation in cpu_inference.implementations(ROOT)]
    summaries = report.summarise([result(name, [123.4], ours="ours" in name) for name in names], 1)
    report.show(console, "s12, batch 1, float32, 2 cores", summaries, {"b": "no torch", "c": "no torch"})
    lines = console.file.getvalue().splitlines()
    for name in names:
        (row,) = [line for line in lines if line.strip().startswith(f"{name}  ")]
        assert "123400 to 123400" in row and "1.00" in row
    assert "left out: b; c (no torch)" in lines
    assert max(map(len, lines)) <= 80


def test_a_comparison_without_other_libraries_shows_our_times(console):
    (ours,) = report.summarise([result("ours", [0.0123], ours=True)], 1)
    assert ours["to_fastest_peer"] is None
    report.show(console, "s12", [ours], {})
    assert "12.3 to 12.3" in console.file.getvalue()


def test_tables_fit_80_columns_one_line_per_row(console):
    converted = convert.Measurement("sail, torch.save", "timm", 10**9, (12.34,), (12.34,), 10**9, 12.34)
    convert._print(console, "m48", [converted])
    pipeline = input_pipeline.Result("ours, Pillow alone", "note", {}, [1234.0])
    input_pipeline.show(console, "imagenet, 98 kB a file: crop+flip+randaugment", [pipeline])
    used = {"name": "transformers, torch.compile", "milliseconds_per_image": 0.01, "mfu": 0.5}
    console.print(gpu.utilization_table([used | {"bandwidth": 4e12, "bandwidth_share": 0.75}]))
    long = "jit(step)/transpose(jvp(PoolFormerForImageClassification))/stages_1/blocks_3/mlp/dot_general"
    console.print(report.costs("costliest kernels", ("MB", "kernel"), [("123,456", "x" * 60, long)]))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for first, last in (
        ("sail, torch.save", "1.00"),
        ("ours, Pillow alone", "1.00x"),
        ("transformers", "(75%)"),
        ("123,456", "dot_general"),
    ):
        (row,) = [line for line in lines if line.strip().startswith(first) and "note" not in line]
        assert row.rstrip().endswith(last)


def test_the_report_is_json_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "results" / "one.json"
    write_json(path, {"machine": report.machine(), "results": report.summarise([result("ours", [1.0])], 1)})
    assert json.loads(path.read_text())["results"][0]["milliseconds_per_image"] == 1000
    assert {"processor", "cores", "python", "date", "load_before"} <= json.loads(path.read_text())["machine"].keys()
    assert [file.name for file in path.parent.iterdir()] == ["one.json"]


@pytest.mark.slow  # three processes
def test_implementations_in_processes_are_compared_and_timed(tmp_path, console, monkeypatch):
    """A batch that the devices of the environment cannot share is computed all the same."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    write_inputs(tmp_path, TINY, batch=1, image_size=32)
    inputs = {"folder": str(tmp_path)}
    implementations = [
        Implementation("ours", f"{OURS}:inference", inputs, ours=True, environment=CPU),
        Implementation("again", f"{OURS}:inference", inputs, environment=CPU),
        Implementation("absent", "benchmarks.peers.absent:inference", inputs),
    ]
    options = argparse.Namespace(rounds=2, seconds=0.0)
    entries = compare(console, "tiny", implementations, options, images=1, tolerance=1e-6)
    ours, again = entries["results"]
    assert (ours["name"], again["name"]) == ("ours", "again")
    assert all(len(one["seconds"]) == 2 and min(one["seconds"]) > 0 for one in (ours, again))
    assert again["difference"] == 0
    assert entries["left_out"]["absent"] == "No module named 'benchmarks.peers.absent'; pip install -e '.[bench]'"
    assert "left out: absent" in console.file.getvalue()


@pytest.mark.slow
def test_our_training_step_learns_the_labels(tmp_path):
    write_inputs(tmp_path, TINY, batch=2, image_size=32)
    options = {"folder": str(tmp_path), "adamw": {"learning_rate": 1e-2}, "steps": 4}
    with started(Implementation("ours", f"{OURS}:training", options, environment=CPU)) as worker:
        assert worker.result[-1] < worker.result[0]
        assert worker.ready["versions"].keys() == {"poolformer_jax", "jax", "flax"}


def test_our_implementation_must_start():
    with pytest.raises(BenchmarkError, match="absent"):
        measure([Implementation("ours", "absent:workload", {}, ours=True)], rounds=1, seconds=0, tolerance=0)


@pytest.mark.slow
def test_the_second_papers_networks_are_written_for_timm(tmp_path):
    config = PoolFormerConfig.from_variant("caformer_s18")
    assert cpu_inference.LIBRARY_OF["caformer_s18"] == "timm"
    write_inputs(tmp_path, config, batch=1, library="timm", image_size=64)
    with started(Implementation("ours", f"{OURS}:inference", {"folder": str(tmp_path)}, environment=CPU)) as worker:
        assert worker.result.shape == (1, 1000)


def test_the_gpu_benchmark_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda _: None)
    assert program.main(["gpu"]) == FAILED
    assert "GPU" in capsys.readouterr().err


def test_the_utilization_of_a_gpu_is_operations_and_bytes_divided_by_time():
    summary = {"seconds": [1.0, 2.0, 9.0], "facts": {"bytes_accessed": 6e12}}
    used = gpu.utilization(summary, steps=1, flops=1e15, peak=gpu.Peak(flops=2e15, bandwidth=4e12))
    assert used == {"mfu": 0.25, "bandwidth": 3e12, "bandwidth_share": 0.75}
    assert gpu.utilization(summary, steps=1, flops=1e15, peak=None)["mfu"] is None
    assert gpu.utilization({"seconds": [1.0], "facts": {}}, steps=1, flops=1e15, peak=None)["bandwidth"] is None


@pytest.mark.live
@pytest.mark.parametrize("benchmark", [cpu_inference, cpu_training])
def test_our_results_agree_with_pytorch(benchmark, tmp_path):
    write_inputs(tmp_path, TINY, batch=2, image_size=64)
    implementations = [one for one in benchmark.implementations(tmp_path) if one.name in ("ours", "PyTorch")]
    results, left_out = measure(implementations, rounds=1, seconds=0.0, tolerance=benchmark.TOLERANCE)
    assert not left_out
    assert [one.name for one in results] == ["ours", "PyTorch"]
