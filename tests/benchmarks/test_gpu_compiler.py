"""Reading the programs that the GPU compiler writes, and compiling the network with it, without a GPU.

The compiler runs in a separate process. Its tests are skipped if jax has no CUDA plugin; `pip install -e '.[cuda12]'`
installs it and needs no GPU.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks import __main__ as program, gpu_compiler
from benchmarks.compiled import gpu_program, gpu_targets, training_step
from benchmarks.gpu import PEAKS, Peak
from paths import ROOT
from poolformer_jax.process import FAILED

pytestmark = pytest.mark.usefixtures("optimised")
needs_compiler = pytest.mark.skipif(not gpu_targets.has_compiler(), reason="jax has no CUDA plugin")

# Lines as the compiler writes them, shortened.
PROGRAM = """
HloModule jit_step, is_scheduled=true

FileNames
1 "a.py"

%fused_add (param_0: bf16[4,8], param_1: bf16[4,8]) -> bf16[4,8] {
  %param_0 = bf16[4,8]{1,0} parameter(0)
  %param_1 = bf16[4,8]{1,0} parameter(1)
  ROOT %add.9 = bf16[4,8]{1,0} add(%param_0, %param_1)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %value = f32[8]{0} get-tuple-element(%p), index=1
  %loop_sine_fusion = f32[8]{0} fusion(%value), kind=kLoop, calls=%fused_sine, metadata={op_name="jit(step)/while/sin"}
  ROOT %tuple.1 = (s32[], f32[8]{0}) tuple(%value, %loop_sine_fusion)
}

%small (p.1: (f32[8])) -> f32[8] {
  %p.1 = (f32[8]{0}) parameter(0)
  %value.1 = f32[8]{0} get-tuple-element(%p.1), index=0
  ROOT %copy.1 = f32[8]{0} copy(%value.1)
}

%large (p.2: (f32[8])) -> f32[8] {
  %p.2 = (f32[8]{0}) parameter(0)
  %value.2 = f32[8]{0} get-tuple-element(%p.2), index=0
  %wrapped = f32[8,8]{1,0} fusion(%value.2), kind=kLoop, calls=%wrapped_broadcast
  ROOT %reduce = f32[8]{0} fusion(%wrapped), kind=kInput, calls=%fused_reduce
}

%command_buffer (p.3: f32[8]) -> f32[8] {
  %p.3 = f32[8]{0} parameter(0)
  ROOT %negate = f32[8]{0} fusion(%p.3), kind=kLoop, calls=%fused_negate
}

ENTRY %main (x: bf16[4,8], y: f32[8], i: s32[], c: pred[]) -> (bf16[4,8], bf16[2,3], f32[8], f32[8], f32[8]) {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %i = s32[] parameter(2)
  %c = pred[] parameter(3)
  %gemm_fusion_dot = bf16[4,8]{1,0} fusion(%x, %x), kind=kCustom, calls=%gemm, metadata={op_name="jit(step)/stages_0/dot_general"}, backend_config={"fusion_backend_config":{"kind":"__triton_gemm","n":1}}
  %conv = (bf16[2,3]{1,0}, u8[0]{0}) custom-call(%x, %gemm_fusion_dot), custom_call_target="__cudnn$convForward"
  %result = bf16[2,3]{1,0} get-tuple-element(%conv), index=0
  %mlp = (bf16[4,8]{1,0}, /*index=1*/f32[4]{0}) custom-call(%gemm_fusion_dot), custom_call_target="__gpu$xla.gpu.triton"
  %while = (s32[], f32[8]{0}) while(%tuple.0), condition=%rounds, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %conditional = f32[8]{0} conditional(%c, %tuple.2, %tuple.2), true_computation=%small, false_computation=%large
  %call = f32[8]{0} call(%conditional), to_apply=%command_buffer
  %copy-start = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%y)
  %copy-done = f32[8]{0} copy-done(%copy-start)
  ROOT %tuple = (bf16[4,8]{1,0}, bf16[2,3]{1,0}) tuple(%mlp, %result, %copy-done)
}
"""  # noqa: E501

MAP = 4 * 8 * 2  # bytes of bf16[4,8]
VECTOR = 8 * 4  # bytes of f32[8]


def test_the_bytes_of_a_kernel_are_its_operands_and_results():
    """Pallas kernels and library calls are kernels, too. An operand that occurs twice counts once."""
    kernels = {kernel.name: kernel for kernel in gpu_program.kernels(PROGRAM)}
    gemm, conv, mlp = kernels["gemm_fusion_dot"], kernels["conv"], kernels["mlp"]
    assert (gemm.read, gemm.written, gemm.times) == (MAP, MAP, 1)
    assert gemm.source == "jit(step)/stages_0/dot_general"
    assert (conv.read, conv.written) == (2 * MAP, 2 * 3 * 2)
    assert (mlp.read, mlp.written) == (MAP, MAP + 4 * 4)
    # An asynchronous copy returns its operand, its result and a number.
    assert kernels["copy-start"].bytes == 2 * VECTOR + 4
    kinds = {gemm.kind, conv.kind, mlp.kind, kernels["negate"].kind}
    assert kinds == {"fusion, __triton_gemm", "__cudnn$convForward", "__gpu$xla.gpu.triton", "fusion, kLoop"}


def test_kernels_in_loops_branches_and_calls_count_once_per_run():
    """Of two branches the one with more bytes counts. The instructions inside a fusion are not kernels."""
    kernels = gpu_program.kernels(PROGRAM)
    times = {kernel.name: kernel.times for kernel in kernels}
    assert times == {
        **{"gemm_fusion_dot": 1, "conv": 1, "mlp": 1, "loop_sine_fusion": 7},
        **{"wrapped": 1, "reduce": 1, "negate": 1, "copy-start": 1},
    }
    by_name = {kernel.name: kernel for kernel in kernels}
    assert by_name["loop_sine_fusion"].bytes == 7 * 2 * VECTOR
    assert gpu_program.total_bytes(kernels) == sum(kernel.bytes for kernel in kernels)
    assert [one.name for one in gpu_program.costliest(kernels, 2)] == ["loop_sine_fusion", "wrapped"]
    kinds = gpu_program.by_kind(kernels)
    assert next(iter(kinds)) == "fusion, kLoop"
    assert kinds["fusion, kLoop"] == {"count": 7 + 1 + 1, "bytes": 7 * 2 * VECTOR + (VECTOR + 256) + 2 * VECTOR}


def test_the_lower_bound_is_the_longer_of_two_times():
    peak = Peak(flops=10.0, bandwidth=4.0)
    slow_memory = gpu_compiler.lower_bound(accessed=8, flops=10, peak=peak)
    assert (slow_memory["seconds_for_bytes"], slow_memory["seconds_for_operations"]) == (2.0, 1.0)
    assert slow_memory["seconds_at_least"] == 2.0
    assert gpu_compiler.lower_bound(accessed=8, flops=30, peak=peak)["seconds_at_least"] == 3.0


def test_training_takes_three_times_the_operations_of_inference():
    # s12 has 1.82 G MACs, as in the README.
    assert training_step.operations("s12", "inference") == pytest.approx(2 * 1.82e9, rel=3e-3)
    assert training_step.operations("s12", "training") == 3 * training_step.operations("s12", "inference")


@pytest.mark.parametrize("name", gpu_targets.TARGETS)
def test_every_target_has_a_peak_and_a_complete_description(name):
    text = gpu_targets.TARGETS[name].text(name)
    assert text.count("{") == text.count("}")
    assert f'"{name}"' in text
    assert f"memory_bandwidth: {PEAKS[name].bandwidth:.0f}\n" in text
    # 227, 163 and 99 KiB: the most shared memory per block in CUDA's programming guide.
    largest = {(9, 0): 232448, (8, 0): 166912, (8, 9): 101376}[gpu_targets.TARGETS[name].capability]
    assert f"shared_memory_per_block_optin: {largest}\n" in text


def test_a_missing_compiler_is_named_with_the_extra_that_installs_it(capsys, monkeypatch):
    monkeypatch.setattr(gpu_targets, "has_compiler", lambda: False)
    assert program.main(["gpu-compiler"]) == FAILED
    printed = capsys.readouterr().err
    assert "pip install -e '.[train,cuda12]'" in printed
    assert "no GPU" in printed
    assert len(printed.splitlines()) == 1


COMPILE = """
import dataclasses, json, sys
from benchmarks import gpu_compiler
from benchmarks.compiled import training_step
from poolformer_jax import PoolFormerConfig
from train.recipes import RECIPES

# A narrow and a wide block on small images.
small = dict(
    depths=(1, 1), hidden_sizes=(64, 320), patch_sizes=(7, 3), strides=(4, 2), padding=(2, 1),
    token_mixers=("pooling",) * 2, position_embeddings=(False,) * 2,
)
training_step.SIZE = gpu_compiler.SIZE = 32
PoolFormerConfig.from_variant = lambda _: PoolFormerConfig(**small)
recipe = RECIPES["imagenet-s12"]
model = dataclasses.replace(recipe.config.model, **small)
data = dataclasses.replace(recipe.config.data, image_size=32)
RECIPES["imagenet-s12"] = dataclasses.replace(
    recipe, config=dataclasses.replace(recipe.config, model=model, data=data)
)
sys.exit(gpu_compiler.main(sys.argv[1:]))
"""


@needs_compiler
@pytest.mark.parametrize(
    ("flags", "kernels"),
    [
        # MLP kernels: one per block, in the forward pass.
        ([], [2, 2]),
        (["--gpu", "NVIDIA A100-SXM4-80GB"], [2, 2]),
        (["--gpu", "NVIDIA L4"], [2, 2]),  # the least shared memory
        (["--no-kernels"], [0, 0]),
        (["--plain"], [0, 0]),
    ],
    ids=["H200", "A100", "L4", "without kernels", "plain"],
)
def test_the_gpu_compiler_compiles_inference_and_training(flags, kernels, tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", COMPILE, "--batch", "8", "--json", str(tmp_path / "found.json"), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "120"},
        cwd=ROOT,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())["estimates_not_measurements"]
    assert set(found) == {"s12 inference", "s12 training"}
    for result in found.values():
        assert result["kernels"] > 2
        # At least the feature maps of the narrow block, [8, 8, 8, 64] in bfloat16, are read and written.
        assert result["bytes"] > 2 * 2 * 8 * 8 * 8 * 64 * 2
        assert any(re.match("__cudnn", kind) for kind in result["kinds"])
    assert found["s12 training"]["bytes"] > found["s12 inference"]["bytes"]
    ours = [
        found[f"s12 {work}"]["kinds"].get("__gpu$xla.gpu.triton", {"count": 0}) for work in ("inference", "training")
    ]
    assert [one["count"] for one in ours] == kernels
