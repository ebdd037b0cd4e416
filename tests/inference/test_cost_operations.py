"""Counts of parameters and MACs agree with the paper and with the operations that jax runs."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from golden.published import FOLDER as GOLDEN
from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification
from poolformer_jax.inference.cost_operations import count_macs, layer_table, parameter_shapes
from poolformer_jax.network.parameters import count_parameters
from poolformer_jax.network.variants import FAMILIES, SIZES, VARIANTS


def subjaxprs(equation):
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def multiplications(jaxpr):
    """The number of multiplications in all convolutions and matrix products, nested ones included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape  # HWIO
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(kernel[:3])
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        elif equation.primitive.name == "cond":  # one branch runs: CPUs have their own
            total += max(multiplications(inner) for inner in subjaxprs(equation))
        else:
            total += sum(multiplications(inner) for inner in subjaxprs(equation))
    return total


def norm_elements(config, size):
    """How many numbers the norms of a "norm_pool" network read."""
    sides = config.feature_sizes(size)
    maps = [side**2 * channels for side, channels in zip(sides, config.hidden_sizes)]
    return sum(2 * depth * elements for depth, elements in zip(config.depths, maps)) + maps[-1]


# The paper's table, as fvcore counted it: README of sail-sg/poolformer, "PoolFormer Models".
@pytest.mark.parametrize(("name", "billions"), [("s12", 1.8), ("s24", 3.4), ("s36", 5.0), ("m36", 8.8), ("m48", 11.6)])
def test_macs_are_those_of_the_paper(name, billions):
    assert round(count_macs(PoolFormerConfig.from_variant(name)) / 1e9, 1) == billions
    assert SIZES[name].macs_g == billions


COUNTS = json.loads((GOLDEN / "family/counts.json").read_text())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.results], ids=lambda family: family.title)
def test_every_published_number_of_macs_is_the_rounded_count(family):
    for name, results in family.results.items():
        for result in results:
            macs = count_macs(PoolFormerConfig.from_variant(name), result.image_size, result.image_size)
            assert round(macs / 1e9, 1) == result.macs_g, (name, result)


@pytest.mark.parametrize("name", COUNTS)
def test_macs_of_the_second_paper_are_exact(name):
    """Without norms, which its authors write by hand, so that fvcore does not see them."""
    assert count_macs(PoolFormerConfig.from_variant(name)) == COUNTS[name]["macs_without_norms_224"]


@pytest.mark.parametrize("name", list(VARIANTS))
def test_parameters_of_the_layers_add_up_to_those_of_the_network(name):
    config = PoolFormerConfig.from_variant(name, depths=(3, 1, 2, 1))
    assert sum(row.parameters for row in layer_table(config)) == count_parameters(config)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("s12", "metaformer_ppaa_s12_224") else pytest.mark.slow)
        for name in VARIANTS
        if name.startswith(("metaformer", "s12"))
    ],
)
def test_macs_are_the_multiplications_that_jax_runs_and_five_per_normalised_number(name):
    config = PoolFormerConfig.from_variant(name)
    params = parameter_shapes(config)
    pixels = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    # Both norms have the same products, and layer norm is never computed by the fused blocks.
    plain = PoolFormerForImageClassification(dataclasses.replace(config, norm="layer_norm"))
    jaxpr = jax.make_jaxpr(plain.apply)({"params": params}, pixels)
    expected = multiplications(jaxpr.jaxpr) + 5 * norm_elements(config, 224)
    assert count_macs(config) == expected


def test_the_layer_table_adds_up_and_shows_the_feature_maps():
    config = PoolFormerConfig.from_variant("s12")
    rows = layer_table(config, 256, 192)
    assert sum(row.parameters for row in rows) == count_parameters(config) == 11_915_176
    shapes = {row.name: row.output_shape for row in rows}
    assert shapes["stem"] == (64, 48, 64)
    assert shapes["stages_3/blocks_0..1 (pooling)"] == (8, 6, 512)
    assert shapes["head"] == (1000,)
    headless = layer_table(PoolFormerConfig.from_variant("s12", num_labels=0))
    assert headless[-1].name == "norm"


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [("s12", (16, 64), "at least 32 pixels"), ("metaformer_pppf_s12_224", (448, 448), "images of 224 by 224 pixels")],
)
def test_an_image_size_that_the_network_does_not_take_is_refused(name, size, message):
    with pytest.raises(ValueError, match=message):
        layer_table(PoolFormerConfig.from_variant(name), *size)


def test_a_network_without_padding_has_a_layer_table():
    config = PoolFormerConfig.from_variant("s12", padding=(0, 0, 0, 0))
    assert layer_table(config, 64, 64)[-2].output_shape == (512,)
    with pytest.raises(ValueError, match="at least 63 pixels"):
        layer_table(config, 62, 64)
