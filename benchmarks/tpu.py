"""Compiles the network for TPUs that are not present, and reports cycles, bytes, memory and collectives.

The compiler is part of libtpu and runs on any Linux host:
  pip install -e '.[train,tpu]'

Nothing is measured. Cycles are the compiler's estimates (`estimated_cycles`), added up as if nothing overlapped. Images
per second and MFU follow from them and are estimates, too. Transfers between HBM and VMEM that overlap with other work
have no estimate; the report counts them.

The compiler does not estimate Pallas kernels. For each, the report uses the length of its schedule
(benchmarks/compiled/tpu_schedules.py) or the time its bytes and operations need at least, whichever is longer.

`--peer torchax` compiles timm's network instead (pip install torchax timm).
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.compiled import tpu_program, tpu_schedules
from benchmarks.compiled.tpu_chips import Chip, chip_of
from benchmarks.compiled.tpu_program import Instruction

# libtpu reads these when it starts. There is no TPU, and several compilers may run at once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import command_line, report
from benchmarks.compiled.training_step import SIZE, Step, lower_training, operations
from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification, TpuKernels
from poolformer_jax.errors import InputError, MissingDependencyError
from poolformer_jax.files import write_json
from poolformer_jax.network import SIZES, VARIANTS


def main(arguments: Sequence[str]) -> int:
    """Compiles, prints and writes. Returns the exit code."""
    parsed = command_line.parse(_parser(), arguments)
    if parsed.peer and (parsed.plain or parsed.no_kernels):
        raise InputError(
            "--plain and --no-kernels change our network, and --peer compiles timm's. Expected --peer alone."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise MissingDependencyError("The TPU compiler is not installed. Install it: pip install -e '.[train,tpu]'")
    console = report.create_console(stderr=True)
    targets, results, texts = {}, {}, []
    with tpu_schedules.recorded() as schedules:
        for topology in parsed.topology:  # checked before the first compilation, which takes minutes
            try:
                devices = topologies.get_topology_desc(
                    platform="tpu", topology_name=topology, num_slices=parsed.slices
                ).devices
                targets[topology] = chip_of(topology), devices
            except (ValueError, RuntimeError) as error:
                raise InputError(f"Cannot compile for topology {topology}: {error}") from error
        for topology, (chip, devices) in targets.items():
            for work in parsed.work:
                with console.status(f"compiling {work} of {parsed.variant} for {topology}; this takes minutes"):
                    lower = functools.partial(_lower_peer, work) if parsed.peer else _RUNS[work]
                    result, text = _describe(lower(parsed, devices), parsed.top, chip, schedules)
                result |= _speed(result, work, parsed, chip)
                results[f"{topology} {work}"] = result
                texts.append(text)
                _print(topology, work, result, parsed)
                console.print()
    if parsed.text:
        parsed.text.write_text("\n".join(texts))
    ours = {"fused": not parsed.plain, "kernels": not (parsed.plain or parsed.no_kernels)}
    packages = ("jax", "jaxlib", "libtpu", "optax", *(("torch", "torchax", "timm") if parsed.peer else ("flax",)))
    content = {
        "command": parsed.command,
        "variant": parsed.variant,
        **({"peer": parsed.peer} if parsed.peer else ours),
        "images_per_chip": parsed.images_per_chip,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "estimates_not_measurements": results,
    }
    write_json(parsed.json, content)
    print(f"written to {parsed.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser("tpu", __doc__, example="--topology v5e:16x16 --work training")
    parser.add_argument(
        "--topology",
        nargs="+",
        metavar="NAME",
        default=["v5e:4x4"],
        help="also v5e:16x16, v6e:4x4, ... (default: v5e:4x4)",
    )
    parser.add_argument(
        "--slices", type=int, metavar="N", default=1, help="slices of that topology in one run (default: 1)"
    )
    command_line.add_choices(parser, "--work", _RUNS)
    command_line.add_variants(parser, VARIANTS, "s12")
    parser.add_argument("--images-per-chip", type=int, metavar="N", default=64, help="images per chip (default: 64)")
    parser.add_argument("--peer", choices=["torchax"], help="compile timm's network through torchax instead of ours")
    command_line.add_compilation(parser)
    return parser


def _lower_forward(parsed: argparse.Namespace, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
    """Logits and loss of evaluation, the batch sharded over all chips."""
    mesh = Mesh(np.asarray(devices), ("batch",))
    model = PoolFormerForImageClassification(
        PoolFormerConfig.from_variant(parsed.variant),
        dtype=jnp.bfloat16,
        fused=not parsed.plain,
        kernels=TpuKernels(mesh, ("batch",)) if not parsed.no_kernels else None,
    )
    replicated, sharded = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    variables = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated), shapes)
    batch = parsed.images_per_chip * len(devices)
    pixels = jax.ShapeDtypeStruct((batch, SIZE, SIZE, 3), jnp.bfloat16, sharding=sharded)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharded)

    def forward(variables: Any, pixels: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        output: Any = model.apply(variables, pixels, labels)
        return output.logits, output.loss

    return jax.jit(forward).lower(variables, pixels, labels)


def _lower_training(parsed: argparse.Namespace, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
    step = Step(parsed.variant, parsed.images_per_chip, kernels=not parsed.no_kernels, fused=not parsed.plain)
    return lower_training(step, devices)


def _lower_peer(work: str, parsed: argparse.Namespace, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
    from benchmarks.peers import torchax_timm

    name = f"poolformer_{parsed.variant}" if parsed.variant in SIZES else parsed.variant
    return torchax_timm.lower(name, parsed.images_per_chip, devices, work == "training")


_RUNS = {"forward": _lower_forward, "training": _lower_training}


def _describe(lowered: jax.stages.Lowered, top: int, chip: Chip, schedules: Path) -> tuple[dict[str, Any], str]:
    """Figures of the compiled program, with bytes and operations per chip; and its text."""
    start = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - start
    text = compiled.as_text() or ""
    instructions = tpu_program.instructions(text)
    kernels = _kernels(tpu_program.kernels(instructions), chip, schedules)
    program = tpu_program.with_kernels(instructions, {name: kernel["cycles"] for name, kernel in kernels.items()})
    costs: Any = compiled.cost_analysis() or {}
    memory: Any = compiled.memory_analysis()
    return {
        "compile_seconds": round(seconds, 1),
        "estimated_cycles": tpu_program.total_cycles(program),
        "of_these_in_kernels": tpu_program.total_cycles(program) - tpu_program.total_cycles(instructions),
        "flops": costs.get("flops"),
        "bytes_accessed": costs.get("bytes accessed"),
        "memory_bytes": {
            "arguments": memory.argument_size_in_bytes,
            "outputs_beside_them": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
        },
        "collectives": [
            {"opcode": c.opcode, "bytes": tpu_program.collective_bytes(c), "times": c.times, "source": c.source}
            for c in tpu_program.collectives(program)
        ],
        "cycles_by_part": tpu_program.cycles_by_part(program),
        "costliest": [asdict(instruction) for instruction in tpu_program.costliest(program, top)],
        "kernels": kernels,
        "without_estimate": tpu_program.without_estimate(program),
    }, text


def _kernels(kernels: list[Instruction], chip: Chip, schedules: Path) -> dict[str, dict[str, Any]]:
    """The cycles of each Pallas kernel, by name: of its schedule, and its lower bound."""
    scheduled = tpu_schedules.cycles(schedules, kernels)
    described = {}
    for kernel in kernels:
        assert kernel.kernel is not None
        bound = kernel.kernel.bound(chip)
        described[kernel.name] = {
            **asdict(kernel.kernel),
            "scheduled_cycles": scheduled.get(kernel.name),
            "bound_cycles": bound,
            "cycles": max(scheduled.get(kernel.name, 0), bound),
        }
    for path in schedules.iterdir():  # the next program has kernels with the same names
        path.unlink()
    return described


def _speed(result: dict[str, Any], work: str, parsed: argparse.Namespace, chip: Chip) -> dict[str, float]:
    """Images per second and MFU of one chip, if the estimate were exact."""
    images = parsed.images_per_chip / (result["estimated_cycles"] / chip.clock)
    flops = operations(parsed.variant, work)
    return {"images_per_second_estimate": images, "mfu_estimate": images * flops / chip.peak_flops}


def _print(topology: str, work: str, result: dict[str, Any], parsed: argparse.Namespace) -> None:
    chip, memory = chip_of(topology), sum(result["memory_bytes"].values())
    facts = {
        "compile time": f"{result['compile_seconds']:.0f} s",
        "estimated cycles": f"{result['estimated_cycles']:.3g}",
        "  of these in kernels": f"{result['of_these_in_kernels']:.3g}",
        "operations": f"{result['flops'] / 1e9:.0f} G",
        "bytes accessed": f"{result['bytes_accessed'] / 1e9:.2f} GB",
        "memory": f"{memory / 1e9:.2f} of {chip.hbm_bytes / 1e9:.0f} GB",
        "images/s (estimate)": f"{result['images_per_second_estimate']:.0f}",
        "MFU (estimate)": f"{result['mfu_estimate']:.0%}",
    }
    parts = {f"  cycles, {name}": f"{share:.3g}" for name, share in result["cycles_by_part"].items()}
    left_out = {
        f"  no estimate: {one['count']} x {opcode}": f"{one['bytes'] / 1e6:.1f} MB"
        for opcode, one in result["without_estimate"].items()
    }
    title = f"{parsed.variant}, {work}, {topology}: one chip, {parsed.images_per_chip} images, bfloat16"
    console = report.create_console()
    table = report.table(title, ("", "compiler's figure"))
    for name, figure in (facts | parts | left_out).items():
        table.add_row(name, figure)
    console.print(table)
    for collective in result["collectives"]:
        times = f"{collective['times']} x " if collective["times"] > 1 else ""
        console.print(f"{times}{collective['opcode']} of {collective['bytes'] / 1e6:.3f} MB", highlight=False)
    if not result["collectives"]:
        console.print("no collectives")
    costs = [(f"{row['cycles'] * row['times']:,}", row["name"], row["source"]) for row in result["costliest"]]
    console.print(report.costs("costliest instructions", ("cycles", "instruction"), costs))
