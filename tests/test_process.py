"""Available cores and memory respect control groups' limits; errors that a person can fix become one message."""

import errno
import math
import os
import subprocess
import sys

import pytest

from paths import ROOT
from poolformer_jax import process, resources
from poolformer_jax.process import error_message
from poolformer_jax.resources import available_cores


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes a fake /sys/fs/cgroup and /proc/self/cgroup."""

    def write(own, files):
        (tmp_path / "own").write_text("".join(f"{line}\n" for line in own))
        for name, content in files.items():
            path = tmp_path / "mounted" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    monkeypatch.setattr(resources, "_PROCESS_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(resources, "_CGROUP_ROOT", tmp_path / "mounted")
    return write


V2 = ["0::/a/b"]
V1 = ["5:cpu,cpuacct:/a/b", "4:memory:/a/b", "0::/"]


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        (V2, {}, math.inf),
        (V2, {"a/b/cpu.max": "max 100000"}, math.inf),
        (V2, {"a/b/cpu.max": "250000 100000"}, 2.5),
        (V2, {"a/b/cpu.max": "400000 100000", "a/cpu.max": "150000 50000", "cpu.max": "max 100000"}, 3),
        (["0::/"], {"cpu.max": "50000 100000"}, 0.5),  # as in a container
        (["0::/../c"], {"cpu.max": "200000 100000", "../c/cpu.max": "100000 100000"}, 2),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/a/b/cpu.cfs_period_us": "100000"}, math.inf),
        (V1, {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"}, 2),
        # A container sees its group as the outermost one.
        (V1, {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1.5),
        ([], {"cpu.max": "50000 100000"}, math.inf),
    ],
)
def test_the_lowest_limit_of_all_enclosing_groups_applies(groups, own, files, cores):
    groups(own, files)
    assert resources.core_limit() == cores


@pytest.mark.parametrize(
    ("affinity", "quota", "cores"),
    [(8, "250000 100000", 3), (2, "250000 100000", 2), (8, "10000 100000", 1), (8, "max 100000", 8)],
)
def test_cores_are_limited_by_the_cpu_set_and_the_quota(groups, monkeypatch, affinity, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    groups(V2, {"a/b/cpu.max": quota})
    assert available_cores() == cores


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        (V2, {"a/b/memory.max": "max", "a/b/memory.current": "70"}, math.inf),
        (V2, {"a/b/memory.max": "100", "a/b/memory.current": "70"}, 30),
        (V2, {"a/memory.max": "100", "a/memory.current": "130", "memory.max": "max", "memory.current": "7"}, 0),
        (
            V2,
            {
                "a/b/memory.max": "100",
                "a/b/memory.current": "70",
                "a/b/memory.stat": "anon 30\nfile 40\ninactive_file 20\nactive_file 5",
            },
            55,  # cached files count as free, except those of shared memory
        ),
        (
            V1,
            {
                "memory/a/memory.limit_in_bytes": "100",
                "memory/a/memory.usage_in_bytes": "70",
                "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 20",
            },
            50,
        ),
    ],
)
def test_free_memory_is_limited_by_groups_and_includes_cached_files(groups, own, files, left):
    groups(own, files)
    assert resources.available_memory() == left


def test_without_groups_there_is_no_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "_PROCESS_CGROUPS", tmp_path / "none")
    assert (resources.core_limit(), resources.available_memory()) == (math.inf, math.inf)


@pytest.mark.slow
def test_a_missing_gpu_is_one_line_that_names_the_extra(tmp_path):
    program = ["train", "smoke", "--run-dir", str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *program]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (ended.returncode, "Traceback" in ended.stderr) == (1, False)
    assert "error: JAX_PLATFORMS=cuda: jax sees no NVIDIA GPU." in ended.stderr
    assert "pip install -e '.[cuda12]'" in ended.stderr


def test_an_error_of_the_operating_system_names_the_file_first_and_no_number():
    assert error_message(OSError(errno.EROFS, "Read-only file system", "runs/a")) == "runs/a: Read-only file system"


def test_an_assertion_of_a_program_keeps_its_traceback():
    assert error_message(AssertionError()) is None


@pytest.mark.parametrize("is_terminal", [False, True])
def test_errors_are_wrapped_on_a_terminal_only_and_commands_never(capsys, monkeypatch, is_terminal):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(process.sys.stderr, "isatty", lambda: is_terminal, raising=False)
    sentence, command = "a message of more than forty characters, on one line", f"Install it: pip install {'-e . ' * 9}"
    process.print_error(f"{sentence}\n{command}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == command
    assert " ".join(line.strip() for line in lines[:-1]) == f"error: {sentence}"
    assert len(lines) == (3 if is_terminal else 2)
