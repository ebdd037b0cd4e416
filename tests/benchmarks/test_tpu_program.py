"""What the TPU compiler makes of a sharded training step: its collectives and their sizes.

The compiler runs for a topology of four chips, in a separate process. Its tests are skipped if libtpu is not installed;
`pip install -e '.[tpu]'` installs it and needs no TPU.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks.compiled import tpu_program, tpu_schedules
from benchmarks.compiled.tpu_chips import CHIPS
from paths import ROOT

pytestmark = pytest.mark.usefixtures("optimised")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

COMPILE = """
import dataclasses, json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from benchmarks.compiled import tpu_program
from poolformer_jax import PoolFormerConfig
from train.setup import make_parts
from train.recipes import RECIPES
from train.config import MeshConfig

# The first stages of the published networks, where pairs of pixels share the TPU's lanes, on small images.
recipe = RECIPES["imagenet-s12"].config
model = dataclasses.replace(
    recipe.model, depths=(1, 1), hidden_sizes=(64, 128), patch_sizes=(7, 3), strides=(4, 2), padding=(2, 1),
    token_mixers=("pooling",) * 2, position_embeddings=(False,) * 2,
)
if sys.argv[3] == "convformer":
    two = {name: getattr(model, name) for name in ("depths", "hidden_sizes", "token_mixers", "position_embeddings")}
    two = {**two, "patch_sizes": (7, 3), "strides": (4, 2), "padding": (2, 1), "token_mixers": ("sep_conv",) * 2}
    model = PoolFormerConfig.from_variant("convformer_s18", **two, residual_scale_init_values=(None,) * 2)
# The images of four chips share one mixing ratio, like those of two chips in the recipe.
data = dataclasses.replace(recipe.data, batch_size=128 * int(sys.argv[2]), image_size=32)
mesh = MeshConfig(fsdp=int(sys.argv[1]))
recipe = dataclasses.replace(recipe, model=model, data=data, dtype="bfloat16", mesh=mesh, kernels="on")
devices = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2", num_slices=int(sys.argv[2])
).devices
parts = make_parts(recipe, [str(n) for n in range(10)], 1024, devices)
sharding = NamedSharding(parts.mesh, PartitionSpec(parts.mesh.axis_names))
size = recipe.data.image_size, recipe.data.image_size, recipe.data.num_channels
batch = {
    "image": jax.ShapeDtypeStruct((recipe.data.batch_size, *size), jnp.uint8, sharding=sharding),
    "label": jax.ShapeDtypeStruct((recipe.data.batch_size,), jnp.int32, sharding=sharding),
}
program = tpu_program.instructions(parts.step.lower(parts.abstract_state, batch).compile().as_text())
gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(parts.abstract_state.params))
print(json.dumps({
    "collectives": [
        {"kind": c.opcode.removesuffix("-start"), "bytes": tpu_program.collective_bytes(c), "shape": c.shape}
        for c in tpu_program.collectives(program)
    ],
    "gradient_bytes": gradients,
    "large_gradient_bytes": sum(
        4 * leaf.size for leaf in jax.tree.leaves(parts.abstract_state.params) if leaf.size >= mesh.fsdp_min_size
    ),
    "kernels": len(tpu_program.kernels(program)),
}))
"""


def run_python(*arguments):
    """Runs Python in a new process and returns what it prints."""
    # libtpu exits if XLA_FLAGS has flags of the CPU's compiler, as those of the other tests.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    finished = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


def compiled_step(fsdp, slices=1, network="poolformer"):
    return json.loads(run_python("-c", COMPILE, str(fsdp), str(slices), network).splitlines()[-1])


@needs_libtpu
def test_the_benchmark_uses_the_schedule_of_every_kernel(tmp_path):
    path = tmp_path / "tpu.json"
    run_python("-m", "benchmarks", "tpu", "--work", "forward", "--images-per-chip", "16", "--json", str(path))
    (found,) = json.loads(path.read_text())["estimates_not_measurements"].values()
    kernels = found["kernels"].values()
    assert len(kernels) == 24  # pooling and MLP of the 12 blocks of s12
    assert all(kernel["scheduled_cycles"] for kernel in kernels), "libtpu started before its flags were set"
    assert found["of_these_in_kernels"] == sum(kernel["cycles"] for kernel in kernels)


@needs_libtpu
def test_kernels_compute_convformers_blocks():
    """The mixer's start, convolution and end, and the MLP; and the norms of the stem and between the stages."""
    step = compiled_step(fsdp=1, network="convformer")
    assert step["kernels"] == 2 * (2 * 4 + 2)  # forward and backward
    assert {c["kind"] for c in step["collectives"]} == {"all-reduce"}


@needs_libtpu
def test_data_parallel_training_has_one_all_reduce():
    """It sums all gradients in float32. There is no other collective, and Pallas kernels compute the blocks."""
    step = compiled_step(fsdp=1)
    assert step["kernels"] == 4 * 2
    (collective,) = step["collectives"]
    assert collective["kind"] == "all-reduce"
    assert set(re.findall(r"\b([a-z]+\d+)\[", collective["shape"])) == {"f32"}
    # Grouped layers sum the gradients of whole kernels, zeros included: somewhat more than the gradients.
    assert 1 <= collective["bytes"] / step["gradient_bytes"] < 1.5


@needs_libtpu
def test_sharded_training_gathers_weights_and_scatters_gradients():
    """Arrays too small to be sharded are all-reduced. Feature maps are never exchanged."""
    step = compiled_step(fsdp=4)
    total = Counter()
    for collective in step["collectives"]:
        total[collective["kind"]] += collective["bytes"]
    assert set(total) == {"all-gather", "reduce-scatter", "all-reduce"}
    # Every device receives its quarter of a large gradient.
    assert total["reduce-scatter"] >= 0.9 * step["large_gradient_bytes"] / 4
    assert total["all-reduce"] <= step["gradient_bytes"] - step["large_gradient_bytes"] + 2**18
    # Weights are gathered in bfloat16, those of grouped layers with their zeros.
    assert total["all-gather"] < step["gradient_bytes"]
    # A chip's feature map in the first stage has shape [32, 8, 8, 64] in bfloat16.
    assert max(collective["bytes"] for collective in step["collectives"]) < 32 * 8 * 8 * 64 * 2 * 4
    assert total.total() < 4 * step["gradient_bytes"]


@needs_libtpu
@pytest.mark.slow
def test_two_slices_exchange_gradients_alone():
    """Each chip sends its quarter of the large ones to the other slice. Weights are gathered inside a slice."""
    step = compiled_step(fsdp=4, slices=2)
    between = [c for c in step["collectives"] if c["kind"].endswith("-between-slices")]
    assert {c["kind"] for c in between} == {"all-reduce-between-slices"}
    assert 1 / 4 <= sum(c["bytes"] for c in between) / step["gradient_bytes"] < 1
    assert "all-gather" in {c["kind"] for c in step["collectives"]}


PROGRAM = """
HloModule step, is_scheduled=true

%body.1 (p: (f32[8])) -> (f32[8]) {
  %add.1 = f32[8]{0:T(128)} add(%x, %y), metadata={op_name="jit(f)/loop/add"}, backend_config={"estimated_cycles":"10"}
}

%branch.1 (p: (f32[8])) -> (f32[8]) {
  %fusion.2 = f32[8]{0:T(128)} fusion(%x), metadata={op_name="jit(f)/cond/sub"}, backend_config={"estimated_cycles":"30"}
}

ENTRY %main.1 (p0: f32[8]) -> f32[8] {
  %p0 = f32[8]{0:T(128)} parameter(0)
  %while.1 = (f32[8]) while(%t), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"7"}}
  %fusion.1 = bf16[4,8]{1,0:T(8,128)(2,1)} fusion(%p0), metadata={op_name="jit(f)/transpose(jvp())/stages_1/dot_general"}, backend_config={"estimated_cycles":"100"}
  %kernel.1 = bf16[4,8]{1,0:T(8,128)(2,1)} custom-call(%p0), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"rounds":"3",
"tiles":"5"
}}, metadata={op_name="jit(f)/stages_1/kernel"}, backend_config={"custom_call_config":{"body":"AbC","cost_estimate":{"flops":"1000","transcendentals":"0","bytes_accessed":"64"}}}
  %send.1 = (f32[6,8]{1,0}, u32[], token[]) send(%x, %after-all), is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %conditional.1 = (f32[8]) conditional(%p, %t, %t), branch_computations={%body.1, %branch.1}
  %all-gather-start.1 = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%q)
  %all-gather-done.1 = f32[8,8]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %all-reduce.1 = (f32[8]{0}, bf16[3]{0}) all-reduce(%a, %b), replica_groups={}
}
"""  # noqa: E501


def test_loop_bodies_count_once_per_iteration_and_of_branches_the_costliest_one():
    program = tpu_program.instructions(PROGRAM)
    assert tpu_program.total_cycles(program) == 7 * 10 + 100 + 30
    assert [i.name for i in tpu_program.costliest(program, 3)] == ["fusion.1", "add.1", "fusion.2"]
    sizes = [(c.opcode, tpu_program.collective_bytes(c)) for c in tpu_program.collectives(program)]
    assert sizes == [("all-reduce-between-slices", 192), ("all-gather-start", 256), ("all-reduce", 32 + 6)]
    assert tpu_program.without_estimate(program)["custom-call"] == {"count": 1, "bytes": 64}
    assert tpu_program.cycles_by_part(program)["stages_1 backward"] == 100


SCHEDULE = """
= control target key start
LB: loop body
     0   :  { %s6304_s0 = inlined_call_operand.hbm [shape: bf16[4,8]] }
   0x1   :  { %6345 = sst [smem:[#allocation33_spill]] %s6304_s0 }
  0x11 LB: > { %6349 = sst [smem:[#allocation20_spill]] %s3767_s18 }
  0x61 LB: >> { %v6363_v6 = vld [vmem:[#allocation26_spill] sm:$0xff] }
  0x62   : >> { %v6364_v6 = vadd.f32 %v1, %v2 }
"""


def test_the_cycles_of_a_kernel_are_its_bundles_times_the_iterations_of_their_loops(tmp_path):
    (kernel,) = tpu_program.kernels(tpu_program.instructions(PROGRAM))
    assert kernel.kernel == tpu_program.KernelCost(flops=1000, bytes=64, tiles=5, rounds=3)
    assert kernel.kernel.bound(CHIPS["v5e"]) == round(64 / 819e9 * CHIPS["v5e"].clock)
    (tmp_path / "123-kernel.1-07-final_bundles.txt").write_text(SCHEDULE)
    assert tpu_schedules.cycles(tmp_path, [kernel]) == {"kernel.1": 2 + 5 * (1 + 3 * 2)}
    (tmp_path / "123-kernel.1-07-final_bundles.txt").write_text(SCHEDULE + "  0x63 LB: >>> { %v1 = vld %v2 }")
    assert tpu_schedules.cycles(tmp_path, [kernel]) == {}, "a loop that the kernel does not declare"
    program = tpu_program.with_kernels(tpu_program.instructions(PROGRAM), {"kernel.1": 37})
    assert tpu_program.total_cycles(program) == 200 + 37
