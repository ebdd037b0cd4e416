"""The kernels for TPUs and GPUs compute what XLA computes for the blocks, and no less precisely.

Neither device is needed: Pallas interprets the kernels, and lowers them as for the device. test_tpu_program.py and
test_gpu_compiler.py run the compilers.
"""

import dataclasses
import re
from functools import cache, partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

from poolformer_jax import GpuKernels, PoolFormerConfig, PoolFormerForImageClassification, TpuKernels
from poolformer_jax.network import functional
from poolformer_jax.network.fused import block
from poolformer_jax.network.fused.kernels import kernels_for, tpu_mlp, tpu_pooling
from poolformer_jax.network.fused.statistics import Moments, moments_of
from poolformer_jax.network.variants import VARIANTS
from selection import slow_after
from small_networks import TWO_STAGES, distance

INTERPRETED = TpuKernels(interpret=True)
ON_GPU = GpuKernels(interpret=True)
both = pytest.mark.parametrize("kernels", [INTERPRETED, ON_GPU], ids=["tpu", "gpu"])
BATCH = 16
CONFIG = dataclasses.replace(
    TWO_STAGES,
    depths=(1, 1),
    hidden_sizes=(64, 96),
    mlp_ratio=1.0,
    drop_path_rate=0.4,
    layer_scale_init_value=0.5,
)
slow = partial(pytest.param, marks=pytest.mark.slow)
RNG = np.random.default_rng(0)
PIXELS = RNG.normal(size=(BATCH, 16, 16, 3)).astype(np.float32)
LABELS = RNG.integers(5, size=BATCH)


def random(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def both_branches(x, gain, weights, keep, kernels):
    """One block as in the model: map and moments after both branches."""
    x, moments = block.pooling_residual(3, x, moments_of(x), gain, keep, kernels)
    return block.mlp_residual(functional.gelu, x, moments, weights, keep, kernels)


def block_and_gradients(shape, kernels, dtype, seed=1):
    """A block's results on random maps, and the gradients for cotangents of the map and of both moments."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    batch, channels, hidden = shape[0], shape[3], 2 * shape[3]
    weights = block.MlpWeights(
        normal(channels, hidden) / channels**0.5,
        normal(hidden),
        normal(hidden, channels) / hidden**0.5,
        normal(channels),
    )
    x, gain, keep = 2 * normal(*shape) + 1, normal(channels), jnp.asarray(rng.choice([0, 1.25], batch), jnp.float32)
    cotangents = normal(*shape).astype(dtype), Moments(100 * normal(batch), 100 * normal(batch))

    def run(x, gain, weights):
        (y, moments), vjp = jax.vjp(partial(both_branches, keep=keep, kernels=kernels), x, gain, weights)
        return {"map": y, "moments": moments, "gradients": vjp(cotangents)}

    return jax.jit(run)(x.astype(dtype), gain, weights)


@cache
def by_xla(shape, dtype):
    """`block_and_gradients` without kernels, compiled once for several tests."""
    return block_and_gradients(shape, None, dtype)


@pytest.mark.parametrize(
    ("kernels", "shape"),
    [
        (INTERPRETED, (16, 3, 6, 64)),
        (ON_GPU, (16, 4, 4, 64)),
        (ON_GPU, (4, 4, 4, 192)),
        *[slow(INTERPRETED, shape) for shape in [(32, 3, 2, 96), (16, 2, 4, 64), (32, 1, 6, 64)]],
        *[slow(ON_GPU, shape) for shape in [(32, 2, 3, 96), (8, 4, 4, 128), (8, 4, 4, 160)]],
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else value.platform,
)
def test_what_kernels_compute_of_a_block_is_nearer_to_float32_than_without_them(kernels, shape):
    exact = block_and_gradients(shape, None, jnp.float32)
    plain = dict(by_xla(shape, jnp.bfloat16))
    found = block_and_gradients(shape, kernels, jnp.bfloat16)
    if kernels is ON_GPU:  # XLA computes the gradients
        for results in (exact, plain, found):
            del results["gradients"]
    for (path, f), p, e in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(plain), jax.tree.leaves(exact)):
        # Moments are sums over the map, in which roundings cancel by chance: both are far below bfloat16's 4e-3.
        assert distance(f, e) < max(distance(p, e), 1e-3), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_results_do_not_depend_on_the_sizes_of_tiles(monkeypatch):
    shape = (32, 6, 4, 64)
    whole = block_and_gradients(shape, INTERPRETED, jnp.bfloat16)
    monkeypatch.setattr(tpu_pooling, "_ROW_BYTES", 2 * 2 * 16 * 128 * 2)  # two rows of 16 images
    monkeypatch.setattr(tpu_pooling, "_NUMBERS_AT_ONCE", 16 * 128)
    monkeypatch.setattr(tpu_mlp, "_IMAGES", 16)
    monkeypatch.setattr(tpu_mlp, "_ROWS", 3 * 16)
    jax.clear_caches()
    cut = block_and_gradients(shape, INTERPRETED, jnp.bfloat16)
    # Sums in another order change a few roundings to bfloat16; a missing tile would change a tenth.
    assert distance(cut, whole) < 1e-3


def loss(variables, kernels, dtype=jnp.bfloat16, config=CONFIG, pixels=PIXELS, labels=LABELS, fused=True):
    model = PoolFormerForImageClassification(config, dtype=dtype, fused=fused, kernels=kernels)
    return model.apply(variables, pixels, labels, train=True, rngs={"dropout": jax.random.key(7)}).loss


@pytest.fixture(scope="module")
def variables():
    shapes = jax.eval_shape(PoolFormerForImageClassification(CONFIG).init, jax.random.key(0), PIXELS)
    return jax.tree.map(lambda leaf: (0.3 * RNG.normal(size=leaf.shape) + (leaf.ndim == 1)).astype(np.float32), shapes)


def gradient(variables, kernels, **options):
    return jax.jit(jax.value_and_grad(partial(loss, kernels=kernels, **options)))(variables)


@pytest.mark.slow
@both
def test_loss_and_gradients_of_a_network_are_as_near_to_float32_as_the_plain_blocks(variables, kernels):
    exact = gradient(variables, None, dtype=jnp.float32, fused=False)
    plain = gradient(variables, None, fused=False)
    found = gradient(variables, kernels)
    assert distance(found[1], exact[1]) < distance(plain[1], exact[1])
    assert abs(found[0] - exact[0]) < 0.02 * abs(exact[0])


@pytest.mark.slow
@both
def test_several_devices_compute_what_one_does(variables, kernels):
    mesh = Mesh(np.reshape(jax.devices()[:4], (2, 2)), ("data", "fsdp"))
    pixels, labels = np.concatenate([PIXELS] * 4), np.concatenate([LABELS] * 4)
    config = dataclasses.replace(CONFIG, drop_path_rate=0.0)
    one = gradient(variables, kernels, config=config)
    axes = ("data", "fsdp")
    cut = jax.device_put((pixels, labels), NamedSharding(mesh, PartitionSpec(axes)))
    on_mesh = dataclasses.replace(kernels, mesh=mesh, batch_axes=axes)
    several = jax.jit(
        jax.value_and_grad(
            lambda variables, pixels, labels: loss(variables, on_mesh, pixels=pixels, labels=labels, config=config)
        )
    )(variables, *cut)
    # The same images four times: the same mean.
    np.testing.assert_allclose(several[0], one[0], rtol=1e-4)
    assert distance(several[1], one[1]) < 5e-3


@both
@pytest.mark.parametrize(
    "change",
    slow_after(
        1,
        [
            {"dtype": jnp.float32},
            {"pixels": PIXELS[:3], "labels": LABELS[:3]},
            {"config": dataclasses.replace(CONFIG, pool_size=5, hidden_act="silu")},
        ],
    ),
    ids=["float32", "three images", "another window and activation"],
)
def test_xla_computes_what_the_kernels_do_not_support(variables, kernels, change):
    program = jax.make_jaxpr(jax.grad(partial(loss, kernels=kernels)))
    assert "pallas_call" in str(program(variables))
    assert "pallas_call" not in str(jax.make_jaxpr(jax.grad(partial(loss, kernels=kernels, **change)))(variables))


@pytest.mark.parametrize(
    ("shape", "hidden"),
    [
        ((16, 8, 8, 72), 256),
        ((16, 8, 8, 64), 24),
        ((3, 7, 7, 64), 256),
        ((2**13, 16, 16, 256), 1024),
        ((2**15, 16, 16, 256), 64),
    ],
    ids=["channels", "hidden layer", "positions", "too large", "too large a map"],
)
def test_xla_computes_sizes_that_gpu_kernels_do_not_support(shape, hidden):
    assert uses_kernel((16, 8, 8, 64), 256, ON_GPU)
    assert not uses_kernel(shape, hidden, ON_GPU)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tpu_has_memory_for_every_published_network(variant):
    config = PoolFormerConfig.from_variant(variant)
    for size, channels, hidden in zip(config.feature_sizes(224), config.hidden_sizes, config.mlp_hidden_sizes):
        assert uses_kernel((64, size, size, channels), hidden, INTERPRETED)


@pytest.mark.parametrize(
    ("channels", "hidden"), [(1536, 6144), (1024, 8192), (2560, 2560)], ids=["wide", "wide hidden layer", "wide map"]
)
def test_xla_computes_mlps_whose_weights_do_not_fit_into_a_tpus_memory(channels, hidden):
    """The compiler for v5e refused kernels of these sizes, which need 122, 103 and 140 MiB; the limit is 100."""
    assert uses_kernel((16, 7, 7, 1280), 5120, INTERPRETED)
    assert not uses_kernel((16, 7, 7, channels), hidden, INTERPRETED)


def uses_kernel(shape, hidden, kernels):
    """Whether a kernel computes `mlp_residual` of such a map."""
    return "pallas_call" in mlp_program(shape, hidden, kernels)


def mlp_program(shape, hidden, kernels):
    """The jaxpr of `mlp_residual` of such a map."""
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    vector = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    channels, per_image = shape[3], vector(shape[:1])
    weights = block.MlpWeights(*map(vector, [(channels, hidden), (hidden,), (hidden, channels), (channels,)]))
    run = partial(block.mlp_residual, functional.gelu, kernels=kernels)
    return str(jax.make_jaxpr(run)(x, Moments(per_image, per_image), weights, per_image))


@pytest.mark.parametrize(
    ("channels", "name"), [(96, "mlp_forward"), (128, "mlp_forward"), (112, "mlp_hidden"), (192, "mlp_hidden")]
)
def test_a_gpu_kernel_writes_the_hidden_layer_of_many_channels_or_of_many_blocks(channels, name):
    program = mlp_program((16, 8, 8, channels), 4 * channels, ON_GPU)
    assert re.findall(r"\bname=(mlp_forward|mlp_hidden)\b", program) == [name]


@pytest.mark.parametrize("kernels", [TpuKernels(), GpuKernels()], ids=["tpu", "gpu"])
def test_other_platforms_do_not_use_the_kernels(kernels):
    shape = (16, 4, 4, 64)
    jax.tree.map(
        np.testing.assert_array_equal, block_and_gradients(shape, kernels, jnp.bfloat16), by_xla(shape, jnp.bfloat16)
    )


def test_every_block_becomes_four_kernels_on_a_tpu(variables):
    step = jax.jit(jax.value_and_grad(partial(loss, kernels=TpuKernels())))
    program = jax.export.export(step, platforms=["tpu"])(variables).mlir_module()
    assert program.count("tpu_custom_call") == 4 * sum(CONFIG.depths)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_every_mlp_becomes_one_kernel_on_a_gpu(variables):
    step = jax.jit(jax.value_and_grad(partial(loss, kernels=GpuKernels())))
    gpu = AbstractDevice("NVIDIA H200", None, "gpu")  # needed from jax 0.11 on
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        program = step.trace(variables).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("__gpu$xla.gpu.triton") == sum(CONFIG.depths)


@pytest.mark.parametrize(
    ("kind", "capability", "kernels"),
    [
        ("TPU v5 lite", None, TpuKernels),
        ("TPU v4", None, type(None)),
        ("NVIDIA H200", "9.0", GpuKernels),
        ("NVIDIA A100-SXM4-80GB", "8.0", GpuKernels),
        ("A100-SXM4-40GB", "8.0", GpuKernels),
        ("Tesla T4", "7.5", type(None)),
        ("AMD Instinct MI300X", "gfx942", type(None)),
        ("cpu", None, type(None)),
    ],
)
def test_each_kind_of_device_gets_its_kernels(kind, capability, kernels):
    assert isinstance(kernels_for(mesh_of(kind, capability), ()), kernels)


def mesh_of(kind, capability):
    """A mesh of one device of that kind."""
    device = Mock(jax.devices()[0], id=0, device_kind=kind, compute_capability=capability)
    return Mesh(np.array([device]), ("data",))


def test_batch_axes_that_the_mesh_lacks_are_refused():
    mesh = Mesh(jax.devices()[:1], ("data",))
    with pytest.raises(ValueError, match=r"batch_axes=\('batch',\) names batch, but the mesh has the axes \('data',\)"):
        TpuKernels(mesh, ("batch",))
