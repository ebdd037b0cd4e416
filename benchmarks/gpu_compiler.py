"""Compiles the network for an NVIDIA GPU that is not present, and counts kernels and the bytes they read and write.

The compiler is part of jax's CUDA plugin and runs on any Linux host:
  pip install -e '.[train,cuda12]'

Nothing is measured. The programs are the network of ImageClassifier on float32 pixels, and the step of
`python -m train` without augmentation. --no-kernels compiles everything by XLA; --plain compiles the blocks as the
paper writes them.

Bytes are the sizes of all operands and results of every kernel. This is an upper estimate: it assumes that each is read
and written whole and that no cache keeps data from one kernel to the next. Operations are those of the network. Bytes
divided by the GPU's bandwidth and operations divided by its peak rate are two times; the longer one is close to the
shortest time the program can take.

Not included: kernels that do not reach bandwidth or peak rate, time between kernels, caches, and autotuning, which
needs the device. Tile sizes and the choice between Triton and NVIDIA's libraries are the compiler's defaults here, and
cuDNN's workspace is not part of the memory.
"""

import argparse
import importlib.metadata
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

# jax reads this when it is imported. There is no GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import command_line, report
from benchmarks.compiled import gpu_program
from benchmarks.compiled.gpu_targets import CUDA, CUDNN, PLUGINS, TARGETS, device
from benchmarks.compiled.training_step import SIZE, Step, lower_training, operations
from benchmarks.gpu import PEAKS, Peak
from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification
from poolformer_jax.compilation import compiler_options
from poolformer_jax.files import write_json
from poolformer_jax.inference import fastest_network
from poolformer_jax.network import SIZES
from poolformer_jax.network.fused import KernelMode


def main(arguments: Sequence[str]) -> int:
    """Compiles, prints and writes. Returns the exit code."""
    parsed = command_line.parse(_parser(), arguments)
    target, peak = device(parsed.gpu), PEAKS[parsed.gpu]
    console = report.create_console()
    results, texts = {}, []
    for variant in parsed.variants:
        for work in parsed.work:
            step = Step(variant, parsed.batch, kernels=not parsed.no_kernels, fused=not parsed.plain)
            with report.create_console(stderr=True).status(
                f"compiling {work} of {variant} for {parsed.gpu}; this takes minutes"
            ):
                result, text = describe(_LOWER[work](step, target), parsed.top)
            result |= lower_bound(result["bytes"], parsed.batch * operations(variant, work), peak)
            results[f"{variant} {work}"] = result
            texts.append(text)
            _print(console, f"{variant}, {work}, {parsed.gpu}: {parsed.batch} images, bfloat16", result, parsed.batch)
    content = {
        "command": parsed.command,
        "gpu": parsed.gpu,
        "target": asdict(TARGETS[parsed.gpu]) | {"cudnn": CUDNN, "cuda": CUDA},
        "batch": parsed.batch,
        "fused": not parsed.plain,
        "kernels": not (parsed.plain or parsed.no_kernels),
        "versions": _versions(),
        "estimates_not_measurements": results,
    }
    if parsed.text:
        parsed.text.write_text("\n".join(texts))
    write_json(parsed.json, content)
    console.print(f"written to {parsed.json}", soft_wrap=True)
    return 0


def _lower_inference(step: Step, target: jax.Device) -> jax.stages.Lowered:
    """The logits of a batch, as ImageClassifier computes them."""
    mesh = Mesh(np.asarray([target]), ("batch",))
    sharding = NamedSharding(mesh, PartitionSpec())
    config = PoolFormerConfig.from_variant(step.variant)
    plain = PoolFormerForImageClassification(config, dtype=jnp.bfloat16, fused=False)
    variables = jax.eval_shape(plain.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    zeros = jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), variables)

    def apply_plain(variables: Any, pixels: jax.Array) -> jax.Array:
        output: Any = plain.apply(variables, pixels)
        return output.logits

    apply: Callable[[Any, jax.Array], jax.Array] = apply_plain
    if step.fused:
        kernels: KernelMode = "on" if step.kernels else "off"
        apply, zeros = fastest_network(config, zeros, mesh, jnp.bfloat16, (SIZE, SIZE), kernels)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), zeros)
    pixels = jax.ShapeDtypeStruct((step.images, SIZE, SIZE, 3), jnp.float32, sharding=sharding)
    return jax.jit(apply, compiler_options=compiler_options(target.platform)).lower(shapes, pixels)


_LOWER: Mapping[str, Callable[[Step, jax.Device], jax.stages.Lowered]] = {
    "inference": _lower_inference,
    "training": lambda step, target: lower_training(step, [target]),
}


def describe(lowered: jax.stages.Lowered, top: int) -> tuple[dict[str, Any], str]:
    """Figures of the compiled program, with the `top` costliest kernels; and its text."""
    start = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - start
    text = compiled.as_text() or ""
    kernels = gpu_program.kernels(text)
    memory: Any = compiled.memory_analysis()
    return {
        "compile_seconds": round(seconds, 1),
        "kernels": sum(kernel.times for kernel in kernels),
        "bytes": gpu_program.total_bytes(kernels),
        "kinds": gpu_program.by_kind(kernels),
        "memory_bytes": {
            "arguments": memory.argument_size_in_bytes,
            "outputs_beside_them": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
        },
        "costliest": [asdict(kernel) | {"bytes": kernel.bytes} for kernel in gpu_program.costliest(kernels, top)],
    }, text


def lower_bound(accessed: int, flops: int, peak: Peak) -> dict[str, float]:
    """Seconds that a GPU needs to access `accessed` bytes and to compute `flops` operations; and the longer of both."""
    times = {"seconds_for_bytes": accessed / peak.bandwidth, "seconds_for_operations": flops / peak.flops}
    return {"operations": flops, **times, "seconds_at_least": max(times.values())}


def _versions() -> dict[str, str]:
    """Versions of the packages that define the program, and of the one that holds the compiler."""
    packages = importlib.metadata.packages_distributions()
    plugins = [name for plugin in PLUGINS for name in packages.get(plugin, ())]
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", *plugins, "flax", "optax")}


def _print(console: Console, title: str, result: dict[str, Any], batch: int) -> None:
    kinds = {f"  {one['count']} x {kind}": f"{one['bytes'] / 1e9:.2f} GB" for kind, one in result["kinds"].items()}
    facts = {
        "compile time": f"{result['compile_seconds']:.0f} s",
        "kernels": f"{result['kernels']}",
        "read and written (upper estimate)": f"{result['bytes'] / 1e9:.2f} GB",
        **kinds,
        "operations": f"{result['operations'] / 1e12:.2f} T",
        "time of the bytes": f"{result['seconds_for_bytes'] * 1e3:.2f} ms",
        "time of the operations": f"{result['seconds_for_operations'] * 1e3:.2f} ms",
        "at least (estimate, nothing measured)": f"{result['seconds_at_least'] * 1e3:.2f} ms",
        "images/s at most (estimate)": f"{batch / result['seconds_at_least']:,.0f}",
        "temporary memory": f"{result['memory_bytes']['temporary'] / 1e9:.2f} GB",
    }
    table = report.table(title, ("", "figure"))
    for name, figure in facts.items():
        table.add_row(name, figure)
    console.print(table)
    rows = []
    for row in result["costliest"]:
        times = f"{row['times']} x " if row["times"] > 1 else ""
        rows.append((f"{row['bytes'] / 1e6:,.0f}", times + row["name"], row["source"]))
    console.print(report.costs("costliest kernels", ("MB", "kernel"), rows))
    console.print()


def _parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser("gpu-compiler", __doc__, example="--variants s12 m36 --work training")
    command_line.add_variants(parser, SIZES, ["s12"])
    command_line.add_choices(parser, "--work", _LOWER)
    parser.add_argument("--batch", type=int, metavar="N", default=256, help="images per call (default: 256)")
    parser.add_argument(
        "--gpu",
        choices=TARGETS,
        metavar="NAME",
        default="NVIDIA H200",
        help=f"{', '.join(TARGETS)} (default: H200)",
    )
    command_line.add_compilation(parser)
    return parser
