"""Kernels are used only where they agree with XLA: "auto" checks every pass on the devices first.

Interpreted kernels stand in for those of a TPU or a GPU.
"""

import inspect
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from jax.sharding import Mesh

from poolformer_jax import GpuKernels, InputError, TpuKernels
from poolformer_jax.network.fused import StageShape, choose_kernels, kernels, verify_kernels
from poolformer_jax.network.fused.kernels import gpu_narrow, tpu_mlp, verification
from poolformer_jax.network.fused.kernels.verification import TOLERANCE

MESH = Mesh(np.asarray(jax.devices()[:2]), ("data",))
ON_TPU = TpuKernels(MESH, ("data",), interpret=True)
ON_GPU = GpuKernels(MESH, ("data",), interpret=True)
STAGES = [StageShape(4, 4, 64, 64)]
CHOOSE = {"mesh": MESH, "batch_axes": ("data",), "dtype": jnp.bfloat16, "stages": STAGES}


@pytest.fixture(autouse=True)
def devices_have_kernels(monkeypatch):
    monkeypatch.setattr(verification, "kernels_for", lambda mesh, batch_axes: ON_TPU)


@pytest.fixture
def replace(monkeypatch):
    """`monkeypatch.setattr`, after clearing jax's caches, whose programs have the other kernel."""

    def replace(*arguments):
        monkeypatch.setattr(*arguments)
        jax.clear_caches()

    yield replace
    jax.clear_caches()


def wrong(kernel, maps, vectors, weights, **options):
    """The kernel's results with a factor of its branch that is too small."""
    return kernel(maps, (*vectors[:2], 0.5 * vectors[2], *vectors[3:]), weights, **options)


@pytest.mark.parametrize("interpreted", [ON_TPU, ON_GPU], ids=["tpu", "gpu"])
def test_kernels_that_agree_with_xla_are_verified(interpreted):
    verified = verify_kernels(interpreted, STAGES, gradients=True)
    assert verified.problem is None
    assert 0 < verified.difference < TOLERANCE / 2
    assert re.fullmatch(r"(pooling|mlp)_(residual|gradient), stage 0", verified.where)


@pytest.mark.parametrize(
    ("module", "function", "name"),
    [
        (tpu_mlp, "forward", "mlp_residual"),
        pytest.param(tpu_mlp, "backward", "mlp_gradient", marks=pytest.mark.slow),
    ],
)
def test_a_kernel_that_differs_is_named_with_the_difference(module, function, name, replace):
    replace(module, function, partial(wrong, getattr(module, function)))
    verified = verify_kernels(ON_TPU, STAGES, gradients=True)
    assert verified.difference > TOLERANCE
    expected = rf"the results of {name} in stage 0 differ from XLA's by \d+\.\d%"
    assert re.fullmatch(expected, verified.problem)


def test_a_kernel_whose_results_are_not_finite_differs(replace):
    right = gpu_narrow.forward

    def overflow(*arguments, **options):
        y, sums, rest = right(*arguments, **options)
        return y.at[0].set(jnp.nan), sums, rest

    replace(gpu_narrow, "forward", overflow)
    assert (
        "mlp_residual in stage 0 differ from XLA's by nan%" in verify_kernels(ON_GPU, STAGES, gradients=False).problem
    )


def call_unknown_function(_, name, pixels, batched, replicated):
    """Can be traced but not compiled."""
    x, moments, *_ = batched
    y = jax.ffi.ffi_call("no_such_kernel", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
    return (y, moments), ()


def test_a_kernel_that_does_not_compile_is_named_with_the_error(replace):
    replace(GpuKernels, "call", call_unknown_function)
    problem = verify_kernels(ON_GPU, STAGES, gradients=False).problem
    assert re.match("mlp_residual cannot run: .*no_such_kernel", problem, re.DOTALL)


def test_a_jax_without_triton_is_named(monkeypatch):
    for name in ("gpu", "gpu_narrow", "gpu_wide"):
        monkeypatch.delitem(sys.modules, f"{kernels.__name__}.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr(pallas, "triton", raising=False)
    jax.clear_caches()
    problem = verify_kernels(ON_GPU, STAGES, gradients=False).problem
    assert re.match("mlp_residual cannot run: ModuleNotFoundError: .*triton", problem)


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="kernels=False: expected 'auto', 'on', 'off'"):
        inspect.unwrap(choose_kernels)(False, **CHOOSE, gradients=False)  # without the tests' check of types


def test_auto_uses_kernels_only_if_they_agree(replace):
    assert choose_kernels("auto", **CHOOSE, gradients=False)[0] is ON_TPU
    replace(tpu_mlp, "forward", partial(wrong, tpu_mlp.forward))
    chosen, verified = choose_kernels("auto", **CHOOSE, gradients=False)
    assert chosen is None
    assert verified.problem in verified.warning


def test_auto_uses_no_kernels_if_another_process_found_a_problem():
    def agree(verified):
        return verification.Verification(problem="of another process")

    assert choose_kernels("auto", **CHOOSE, gradients=False, agree=agree)[0] is None


def test_on_and_off_do_not_check(monkeypatch):
    monkeypatch.setattr(verification, "verify_kernels", lambda *_, **__: pytest.fail("checked"))
    assert choose_kernels("on", **CHOOSE, gradients=True) == (ON_TPU, None)
    assert choose_kernels("off", **CHOOSE, gradients=True) == (None, None)


def test_without_kernels_auto_uses_xla_and_on_is_refused(monkeypatch):
    float32 = CHOOSE | {"dtype": jnp.float32}
    assert choose_kernels("auto", **float32, gradients=True) == (None, None)
    with pytest.raises(InputError, match="kernels='on', but there are none for float32 on cpu"):
        choose_kernels("on", **float32, gradients=True)
    monkeypatch.setattr(verification, "kernels_for", lambda mesh, batch_axes: None)
    assert choose_kernels("auto", **CHOOSE, gradients=True) == (None, None)


@pytest.mark.parametrize("kind", [TpuKernels, GpuKernels])
def test_the_passes_of_every_stage_are_compared(kind, monkeypatch):
    """Also with a last stage of 7 x 7, where only many images fill a tile of a GPU's kernels."""
    compared = {}

    def record(name, kernels, inputs):
        compared[name] = [one.x.shape[1:3] for one in inputs]
        return np.zeros(len(inputs))

    monkeypatch.setattr(verification, "_compiled_differences", lambda platform: record)
    stages = [StageShape(112, 113, 64, 256), StageShape(7, 7, 512, 2048)]
    verify_kernels(kind(Mesh(np.asarray(jax.devices()[:1]), ("data",)), ("data",)), stages, gradients=True)
    gradients = {"mlp_gradient", "pooling_gradient"}
    assert set(compared) == (
        {"mlp_residual", "pooling_residual"} | gradients if kind is TpuKernels else {"mlp_residual"}
    )
    assert all(sizes == [(56, 57), (7, 7)] for sizes in compared.values())
