"""A run uses kernels only if they agree with XLA on its devices; otherwise it trains by XLA, with one warning."""

import dataclasses
from pathlib import Path

import jax
import pytest
from rich.console import Console

from failing_kernels import FAILURES, devices_with_kernels, halve_branch, refuse
from poolformer_jax import InputError, TpuKernels
from poolformer_jax.network.fused.kernels import tpu_mlp
from train import loop, setup
from training import open_and_make_parts, sharded, tiny

CONFIG = tiny(dtype="bfloat16", mesh=sharded(2, 1))


@pytest.fixture(autouse=True)
def _devices_with_kernels(monkeypatch):
    yield from devices_with_kernels(TpuKernels, monkeypatch)


def make_parts(**changes):
    return open_and_make_parts(dataclasses.replace(CONFIG, **changes), jax.devices()[:2])[1]


def test_a_run_trains_with_kernels_that_agree_with_xla():
    parts = make_parts()
    assert parts.network.model.kernels == TpuKernels(parts.mesh, ("data", "fsdp"), interpret=True)
    assert parts.kernel_verification.problem is None


@FAILURES
def test_a_run_trains_by_xla_if_a_kernel_fails_its_check(fail, problem, monkeypatch):
    fail(TpuKernels, tpu_mlp, monkeypatch)
    parts = make_parts()
    assert parts.network.model.kernels is None
    assert problem in parts.kernel_verification.problem


@pytest.mark.slow
def test_all_processes_train_by_xla_if_the_check_fails_on_one(monkeypatch):
    monkeypatch.setattr(setup, "processes_where", lambda here: [3])
    parts = make_parts()
    assert parts.network.model.kernels is None
    assert "[3]" in parts.kernel_verification.problem


def test_on_trains_with_kernels_unchecked_and_off_by_xla(monkeypatch):
    halve_branch(TpuKernels, tpu_mlp, monkeypatch)
    assert make_parts(kernels="on").network.model.kernels is not None
    assert make_parts(kernels="off").network.model.kernels is None


def test_on_is_refused_in_float32():
    with pytest.raises(InputError, match="kernels='on', but there are none for float32"):
        make_parts(kernels="on", dtype="float32")


@pytest.mark.slow  # compiles a training step
def test_a_run_warns_once_of_kernels_that_it_does_not_use(tmp_path: Path, monkeypatch, caplog):
    refuse(TpuKernels, tpu_mlp, monkeypatch)
    config = dataclasses.replace(tiny(tmp_path / "run", dtype="bfloat16", max_steps=1), example_images=0)
    assert loop.run(config, Console(quiet=True)).step == 1
    (warning,) = [record.getMessage() for record in caplog.records if "kernels" in record.getMessage()]
    assert "XLA computes all blocks" in warning
    assert "pooling_residual cannot run: NotImplementedError" in warning
