"""The networks of the second paper are the published ones: logits, maps and gradients agree with timm and the authors.

The golden arrays are PyTorch's, in float64; tests/golden/family/README.md says how they were made.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import fixture_values, published
from network import family_weights
from network.family_weights import FAMILY, HEAD_EPSILON, KINDS, name_of
from network.outputs import outputs, relative_error
from poolformer_jax import MetaFormerForImageClassification
from poolformer_jax.network import merge_collections

slow = pytest.mark.slow
# Of the largest value of what is compared, or of a gradient's norm. At 1e-4 no wrong epsilon would be seen.
TOLERANCE = {"float32": 2e-5, "float64": 1e-9}
MAPS = {"float32": 1e-4, "float64": 1e-9}


def pixel_values(size, images):
    return published.pixel_values(size)[:images]


def compare(home, variant, size, dtype, golden=None):
    golden = family_weights.arrays(home, variant) if golden is None else golden
    config, expected = family_weights.config(home, variant), golden[f"{size}/logits"]
    with jax.enable_x64(dtype == "float64"):
        variables = family_weights.variables(home, config, dtype)
        pixels = pixel_values(size, len(expected)).astype(dtype)
        hidden_states, logits = outputs(config, variables, pixels, dtype, head_norm_epsilon=1e-5)
    assert logits.dtype == dtype
    assert relative_error(logits, expected) < TOLERANCE[dtype]
    maps = [np.asarray(x, np.float64).transpose(0, 3, 1, 2) for x in hidden_states]
    for stage, found in zip(published.stages(golden, size), maps):
        assert found.shape == stage.shape_nchw
        assert relative_error(found.ravel()[stage.index], stage.value) < MAPS[dtype]
        assert relative_error([found.mean(), found.std()], stage.mean_std) < MAPS[dtype]
    for number, found in enumerate(maps):
        if f"{size}/stage{number}/nchw" in golden:
            assert relative_error(found, golden[f"{size}/stage{number}/nchw"]) < MAPS[dtype]


# The authors' head is compared by default, and timm's with the other epsilon where it has one.
QUICK = {("sail", kind, "64x64", "float64") for kind in KINDS} | {
    ("timm", "caformer", "64x64", "float64"),
    ("sail", "caformer", "64x64", "float32"),
    ("sail", "randformer", "32x128", "float64"),
    ("sail", "convformer", "70x93", "float64"),
}
SLOW = {("timm", kind, "64x64", "float64") for kind in KINDS} | {
    ("sail", kind, size, "float64")
    for kind in KINDS
    for size in ("32x128", "70x93")
    if (kind, size) != ("randformer", "70x93")  # its matrices fix the number of positions
}


@pytest.mark.parametrize(
    ("home", "kind", "size", "dtype"),
    [*sorted(QUICK), *(pytest.param(*each, marks=slow) for each in sorted(SLOW - QUICK))],
)
def test_a_small_network_of_each_kind_is_that_of_pytorch(home, kind, size, dtype):
    compare(home, f"{kind}_tiny", size, dtype)


@slow
@pytest.mark.parametrize(
    ("home", "kind", "size", "dtype"),
    [
        *((home, kind, "224x224", "float64") for kind in KINDS for home in HEAD_EPSILON),
        *(("timm", "caformer", size, "float64") for size in ("160x224", "225x193")),
        ("timm", "caformer", "224x224", "float32"),
    ],
)
def test_the_smallest_network_of_each_kind_is_that_of_pytorch(home, kind, size, dtype):
    compare(home, f"{kind}_{KINDS[kind]}", size, dtype)


@slow
@pytest.mark.parametrize("variant", [variant for variant in FAMILY if not variant.endswith(("_s12", "_s18"))])
def test_every_larger_network_is_that_of_pytorch(variant):
    home = "sail" if variant.startswith(("identity", "rand")) else "timm"  # timm has neither
    compare(home, variant, "224x224", "float64")


@slow
def test_a_network_takes_384_pixels_and_21841_classes():
    golden = published.arrays("family/timm", "caformer_s18_384_and_in22k")
    compare("timm", "caformer_s18", "384x384", "float64", golden)
    config = family_weights.config("timm", "caformer_s18", num_labels=21841)
    with jax.enable_x64():
        variables = family_weights.variables("timm", config, "float64")
        _, logits = outputs(config, variables, pixel_values("224x224", 1).astype("float64"), "float64")
    found = np.asarray(logits).ravel()[golden["224x224/in22k_logits/index"]]
    assert relative_error(found, golden["224x224/in22k_logits/value"]) < TOLERANCE["float64"]


def gradients(home, config, size, labels):
    """The loss, and its gradients by PyTorch's names and by "pixels", in PyTorch's layouts."""
    with jax.enable_x64():
        variables = family_weights.variables(home, config, "float64")
        variables = jax.tree.map(jnp.asarray, variables)
        params = variables.pop("params")
        model = MetaFormerForImageClassification(config, dtype="float64")

        def loss(params, pixels):
            return model.apply({"params": params, **variables}, pixels, labels=labels).loss

        pixels = pixel_values(size, len(labels)).astype("float64")
        value, (of_params, of_pixels) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, pixels)
    flat, _ = jax.tree.flatten_with_path(jax.device_get(of_params))
    found = {name_of(home, "/".join(key.key for key in path)): to_torch(leaf) for path, leaf in flat}
    return value, {**found, "pixels": np.asarray(of_pixels).transpose(0, 3, 1, 2)}


def to_torch(leaf):
    return leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T


@slow
@pytest.mark.parametrize(("home", "kind"), [*(("sail", kind) for kind in KINDS), ("timm", "caformer")])
def test_every_gradient_of_a_small_network_is_that_of_pytorch(home, kind):
    variant = f"{kind}_tiny"
    golden = family_weights.arrays(home, variant)
    value, found = gradients(home, family_weights.config(home, variant), "64x64", golden["grad/labels"])
    assert relative_error(value, golden["grad/loss"]) < 1e-9
    names = {key.split("/")[1] for key in golden if key.endswith("/l2_probe_index_value")}
    assert names == found.keys()
    for name, gradient in found.items():
        norm, product, *sample = golden[f"grad/{name}/l2_probe_index_value"]
        index, expected = np.split(np.array(sample), 2)
        probe = fixture_values.uniform(f"probe/{name}", gradient.shape)
        assert abs(np.linalg.norm(gradient) - norm) < 1e-9 * norm, name
        assert abs(np.sum(gradient * probe) - product) < 1e-9 * norm * np.linalg.norm(probe), name
        assert np.abs(gradient.ravel()[index.astype(int)] - expected).max() < 1e-9 * norm, name


@pytest.mark.parametrize("home", HEAD_EPSILON)
@pytest.mark.parametrize("variant", [f"{kind}_{size}" for kind in KINDS for size in ("tiny", KINDS[kind])])
def test_the_arrays_are_those_of_the_state_dict(home, variant):
    config = family_weights.config(home, variant)
    given = published.shapes(f"family/{home}", variant)
    tree, _ = jax.tree.flatten_with_path(merge_collections(family_weights.variables(home, config, np.int8)))
    found = {name_of(home, "/".join(key.key for key in path)): leaf.size for path, leaf in tree}
    assert found == {name: np.prod(shape) for name, shape in given.items()}
