"""timm's networks through torchax (PyTorch operations traced as JAX's), lowered for devices that may be absent.

Parameters are float32 and are cast to bfloat16 for the network, as in our training; pixels are bfloat16. Drop path is
off, and AdamW is optax's. The network is what `timm.create_model` returns: nothing in it is rewritten for a TPU.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch._ops import OpOverloadPacket

from benchmarks.compiled.training_step import SIZE


def _import_torchax() -> tuple[Any, Any]:
    """torchax and its interop. torchax 0.0.13 names overloads for named axes that torch 2.13 no longer has."""
    find = OpOverloadPacket.__getattr__

    def find_or_name(packet: OpOverloadPacket, name: str) -> Any:
        return name if "name" in name and not name.startswith("_") else find(packet, name)

    OpOverloadPacket.__getattr__ = find_or_name
    try:
        import torchax
        from torchax import interop

        torchax.default_env()
    finally:
        OpOverloadPacket.__getattr__ = find
    return torchax, interop


torchax, interop = _import_torchax()
import timm  # noqa: E402  torchax first: it has no part in what timm registers


def lower(name: str, images: int, devices: Sequence[jax.Device], training: bool) -> jax.stages.Lowered:
    """Logits and loss, or a training step with gradient and AdamW; the batch is sharded over all devices."""
    model = timm.create_model(name).train(training)
    mesh = Mesh(np.asarray(devices), ("batch",))
    replicated, sharded = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
    params = {
        key: jax.ShapeDtypeStruct(tuple(value.shape), jnp.float32, sharding=replicated)
        for key, value in model.named_parameters()
    }
    batch = images * len(devices)
    pixels = jax.ShapeDtypeStruct((batch, 3, SIZE, SIZE), jnp.bfloat16, sharding=sharded)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharded)
    optimizer = optax.adamw(1e-3, weight_decay=0.05)

    def forward(params: Any, pixels: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jax.tree.map(lambda array: array.astype(jnp.bfloat16), params)
        with torchax.default_env():
            inputs = interop.torch_view((weights, pixels, labels))
            logits = torch.func.functional_call(model, inputs[0], (inputs[1],))
            loss = torch.nn.functional.cross_entropy(logits.float(), inputs[2].long())
            found: tuple[jax.Array, jax.Array] = interop.jax_view((logits, loss))
        return found

    def step(params: Any, state: Any, pixels: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(lambda params: forward(params, pixels, labels)[1])(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    if not training:
        return jax.jit(forward).lower(params, pixels, labels)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(optimizer.init, params),
    )
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, pixels, labels)
