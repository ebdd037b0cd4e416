"""poolformer_jax: the network that ImageClassifier compiles, and the step that `python -m train` compiles."""

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import poolformer_jax
from benchmarks.compiled import gpu_program
from benchmarks.workload import Workload, read_labels, read_pixels
from poolformer_jax.compilation import compiler_options
from poolformer_jax.inference import RuntimeProgram, fastest_network, shard_on_cpu
from poolformer_jax.network import kernel_stages
from poolformer_jax.network.fused import KernelMode, choose_kernels
from poolformer_jax.resources import available_cores
from poolformer_jax.weights import load_pretrained
from train.compute import make_optimizer, make_train_step, new_state
from train.config import OptimizerConfig

VERSIONS = {"poolformer_jax": poolformer_jax.__version__, "jax": jax.__version__, "flax": flax.__version__}


def inference(folder: str, dtype: str = "float32", kernels: KernelMode = "auto") -> Workload:
    """Logits of a batch, as ImageClassifier computes them.

    On a CPU, one device per core computes a part of the batch if the cores divide it; otherwise one device computes it.
    """
    pixels, cores = read_pixels(folder), available_cores()
    jax.config.update("jax_num_cpu_devices", cores if len(pixels) % cores == 0 else 1)
    platform = jax.default_backend()
    mesh = Mesh(np.asarray(jax.local_devices() if platform == "cpu" else jax.local_devices()[:1]), ("batch",))
    model, variables = load_pretrained(folder)
    apply, params = fastest_network(model.config, variables, mesh, jnp.dtype(dtype), pixels.shape[1:3], kernels)
    shardings = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))
    params, images = jax.device_put((params, jnp.asarray(pixels)), shardings)
    function = jax.jit(shard_on_cpu(apply, mesh), compiler_options=compiler_options(platform))
    compiled = function.lower(params, images).compile()

    def call() -> jax.Array:
        return jax.block_until_ready(compiled(params, images))

    return Workload(call, np.asarray(call()), VERSIONS, cores, _cost(compiled, platform))


def runtime(folder: str, runtime: str) -> Workload:
    """Probabilities of a batch of 8-bit images, as ImageClassifier computes them with `runtime`.

    They are compared with JAX's when the network is exported, and not with the other implementations' logits.
    """
    images = list(np.random.default_rng(2).integers(0, 256, read_pixels(folder).shape, np.uint8))
    model, variables = load_pretrained(folder)
    processor = poolformer_jax.PoolFormerImageProcessor.for_variant("s12")
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        classifier = RuntimeProgram(
            runtime, model.config, variables, processor, output="probabilities", batch_size=len(images)
        )

    def call() -> np.ndarray:
        return classifier(images)

    return Workload(call, call(), VERSIONS, available_cores())


def training(
    folder: str,
    adamw: Mapping[str, Any],
    steps: int,
    dtype: str = "float32",
    kernels: KernelMode = "auto",
    steps_per_call: int = 1,
) -> Workload:
    """Steps: forward, backward, and AdamW's update. The result is the losses of the first ones."""
    model, variables = load_pretrained(folder, dtype=jnp.dtype(dtype))
    pixels = read_pixels(folder)
    mesh = Mesh(np.asarray(jax.local_devices()[:1]), ("batch",))
    stages = kernel_stages(model.config, pixels.shape[1:3], train=True)
    start = time.perf_counter()
    chosen, verification = choose_kernels(kernels, mesh, mesh.axis_names, model.dtype, stages, gradients=True)
    seconds = time.perf_counter() - start
    model = model.clone(kernels=chosen)
    config = OptimizerConfig(**adamw)
    optimizer = make_optimizer(config)
    labels = model.config.num_labels
    step = make_train_step(
        model,
        optimizer,
        schedule=lambda _: jnp.float32(config.learning_rate),
        augment=lambda _, image, label: (image, jax.nn.one_hot(label, labels)),
        config=config,
        seed=0,
    )
    state = new_state(variables["params"], optimizer, ema=False)
    batch = {"image": jnp.asarray(pixels), "label": jnp.asarray(read_labels(folder))}
    platform = jax.default_backend()
    options = compiler_options(platform, training=True)  # those of the training program
    compiled = jax.jit(step, donate_argnums=0, compiler_options=options).lower(state, batch).compile()

    def step_once() -> jax.Array:
        nonlocal state
        state, metrics = compiled(state, batch)
        loss: jax.Array = metrics["loss"]
        return loss

    def call() -> None:
        for _ in range(steps_per_call):
            loss = step_once()
        loss.block_until_ready()

    losses = np.asarray([float(step_once()) for _ in range(steps)])
    facts = _cost(compiled, platform)
    if verification is not None:
        facts |= {"kernel_check": dataclasses.asdict(verification) | {"seconds": seconds}}
    return Workload(call, losses, VERSIONS, available_cores(), facts)


def _cost(compiled: Any, platform: str) -> dict[str, Any]:
    """XLA's cost of one call. On a GPU the bytes come from the program's text, because XLA does not count Pallas."""
    cost = compiled.cost_analysis() or {}
    counted = {name.replace(" ", "_"): cost[name] for name in ("flops", "bytes accessed") if name in cost}
    if platform == "gpu":
        counted["bytes_accessed"] = gpu_program.total_bytes(gpu_program.kernels(compiled.as_text()))
    return counted
