"""What a user of the two modules relies on: shapes, sizes, types, randomness, initial values and error messages."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden.published import FOLDER as GOLDEN
from network import family_weights
from poolformer_jax import (
    ImageClassifierOutput,
    MetaFormerForImageClassification,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerModel,
    PoolFormerModelOutput,
    TpuKernels,
)
from poolformer_jax.network import (
    ACTIVATIONS,
    CONSTANTS,
    MIXER_PARAMETERS,
    TOKEN_MIXERS,
    VARIANTS,
    check_variables,
    config_fields,
    count_parameters,
    cross_entropy,
)
from poolformer_jax.network.functional import NORMS
from poolformer_jax.network.inputs import check_config
from poolformer_jax.network.loss import mean_loss
from small_networks import EVERY_MIXER, TWO_STAGES, random_variables

TINY = PoolFormerConfig(depths=(1, 1, 2, 1), hidden_sizes=(8, 16, 24, 32), num_labels=5)

# The authors' counts; the ablations' follow from sail-sg/poolformer, models/metaformer.py: s12 plus
# 2 * (3 * 512² + 512² + 512) + 512 * 49 for attention in stage 4, and so on.
PARAMETERS = {
    "s12": 11_915_176,
    "s24": 21_388_968,
    "s36": 30_862_760,
    "m36": 56_172_520,
    "m48": 73_473_448,
    "metaformer_id_s12": 11_915_176,
    "metaformer_pppa_s12_224": 11_915_176 + 2 * (4 * 512**2 + 512) + 512 * 49,
    "metaformer_ppaa_s12_224": 11_915_176 + 6 * (4 * 320**2 + 320) + 2 * (4 * 512**2 + 512) + 320 * 196,
    "metaformer_pppf_s12_224": 11_915_176 + 2 * 49**2,
    "metaformer_ppff_s12_224": 11_915_176 + 6 * 196**2 + 2 * 49**2,
}
# Of the second paper, with the arrays that are not trained: counted in the authors' code.
FAMILY = json.loads((GOLDEN / "family/counts.json").read_text())
PARAMETERS |= {name: counts["parameters"] for name, counts in FAMILY.items()}


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


apply_two_stages = jax.jit(PoolFormerForImageClassification(TWO_STAGES).apply)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_the_published_number_of_parameters(variant):
    """Counted from the table; test_names compares the table with the model."""
    config = PoolFormerConfig.from_variant(variant)
    frozen = FAMILY.get(variant, {}).get("frozen", 0)
    assert (count_parameters(config), count_parameters(config, CONSTANTS)) == (PARAMETERS[variant], frozen)


@pytest.mark.parametrize("variant", [name for name in FAMILY if "parameters_21841" in FAMILY[name]])
def test_networks_for_imagenet_21k_have_the_published_number_of_parameters(variant):
    config = PoolFormerConfig.from_variant(variant, num_labels=21841)
    assert count_parameters(config) == FAMILY[variant]["parameters_21841"]


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (225, 193)])
def test_any_size_from_the_stride_up_gives_maps_at_strides_4_to_32(size):
    output = jax.eval_shape(
        PoolFormerModel(TINY).init_with_output, jax.random.key(0), jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    )[0]
    for hidden_state, channels, stride in zip(output.hidden_states, TINY.hidden_sizes, (4, 8, 16, 32)):
        # The stem's 7x7 window with padding 2 loses a pixel where the side is no multiple of 4.
        sides = [((side + 4 - 7) // 4 + 1 + stride // 4 - 1) // (stride // 4) for side in size]
        assert hidden_state.shape == (2, *sides, channels)
    assert output.last_hidden_state.shape == output.hidden_states[-1].shape


# The last stage is one whose hidden layer the backward pass keeps.
WIDE = dataclasses.replace(TWO_STAGES, depths=(1, 1), hidden_sizes=(8, 256))
EVERY = dataclasses.replace(
    TINY, depths=(1,) * 4, hidden_sizes=(8, 16, 32, 32), token_mixers=EVERY_MIXER, image_size=64
)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param(WIDE, {}, id="fused"),
        pytest.param(EVERY, {"fused": False}, id="every mixer", marks=pytest.mark.slow),
        pytest.param(
            WIDE,
            {"dtype": jnp.bfloat16, "kernels": TpuKernels(interpret=True)},
            id="kernels",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_empty_batch_has_empty_results_and_no_gradient(config, options):
    model, variables = PoolFormerForImageClassification(config, **options), random_variables(config)[1]
    none = jnp.zeros((0, 64, 64, 3), jnp.float32)

    def summed(variables):
        output = model.apply(variables, none, train=True)
        return jnp.sum(output.logits), output

    gradient, output = jax.jit(jax.grad(summed, has_aux=True))(variables)
    assert (output.logits.shape, output.logits.dtype) == ((0, 5), jnp.float32)
    assert {state.shape[0] for state in output.hidden_states} == {0}
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("norm", ["group_norm", pytest.param("layer_norm", marks=pytest.mark.slow)])
def test_every_mixer_runs_forward_and_backward(norm):
    config = dataclasses.replace(EVERY, norm=norm, position_embeddings=(False, False, True, True))
    model, variables = random_variables(config)
    loss = lambda variables: model.apply(variables, pixels(2, 64, 64, 3), labels=jnp.array([0, 2])).loss  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_backbone_and_classifier_share_one_parameter_tree():
    _, variables = random_variables(TWO_STAGES)
    backbone = {"params": {k: v for k, v in variables["params"].items() if k not in ("norm", "head")}}
    x = pixels(2, 64, 64, 3)
    features = jax.jit(PoolFormerModel(TWO_STAGES).apply)(backbone, x).hidden_states
    for left, right in zip(features, apply_two_stages(variables, x).hidden_states, strict=True):
        np.testing.assert_array_equal(left, right)


def test_no_labels_means_no_head_and_pooled_features_for_logits():
    _, variables = random_variables(TWO_STAGES)
    config = dataclasses.replace(TWO_STAGES, num_labels=0)
    bare = {"params": {name: branch for name, branch in variables["params"].items() if name != "head"}}
    check_variables(config, bare)
    x = pixels(2, 64, 64, 3)
    features = jax.jit(PoolFormerForImageClassification(config).apply)(bare, x).logits
    assert features.shape == (2, config.hidden_sizes[-1])
    head = variables["params"]["head"]
    np.testing.assert_allclose(
        features @ head["kernel"] + head["bias"], apply_two_stages(variables, x).logits, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("dtype", "label"), [("int8", -1), ("uint8", 255), ("uint32", 2**32 - 1), ("int64", 2**32 + 2), ("uint64", 2**63)]
)
def test_the_loss_of_an_index_outside_the_classes_is_nan_for_every_integer_type(dtype, label):
    """200 does not fit into an int8, and the lower 32 bits of such an index of 64 may be those of a class."""
    with jax.enable_x64(True):
        losses = cross_entropy(jnp.zeros((2, 200)), jnp.array([label, 2], dtype))
    np.testing.assert_array_equal(np.isnan(losses), [True, False])


def test_loss_is_the_mean_cross_entropy_of_indices_and_of_probabilities():
    model, variables = random_variables(TWO_STAGES)
    x, labels = pixels(2, 64, 64, 3), jnp.array([0, 4])
    logits = apply_two_stages(variables, x).logits
    expected = -np.mean([row[label] for row, label in zip(jax.nn.log_softmax(logits), labels)])
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x, labels=labels).loss, expected, rtol=1e-5)
    for given in (labels, jax.nn.one_hot(labels, 5)):
        np.testing.assert_allclose(mean_loss(TWO_STAGES, logits, given), expected, rtol=1e-5)
    assert apply_two_stages(variables, x).loss is None


@pytest.mark.parametrize("fused", [True, False])
def test_drop_path_and_dropout_act_in_training_only_and_follow_their_key(fused):
    # Dropout is computed by the plain blocks only.
    config = dataclasses.replace(TWO_STAGES, drop_path_rate=0.5, dropout_rate=0.0 if fused else 0.1)
    model, variables = random_variables(config)
    x = pixels(4, 32, 32, 3)

    @partial(jax.jit, static_argnums=1)
    def logits(seed, train):
        return model.apply(variables, x, train=train, rngs={"dropout": jax.random.key(seed)}).logits

    np.testing.assert_array_equal(logits(1, True), logits(1, True))
    assert np.abs(logits(1, True) - logits(2, True)).max() > 1e-3
    np.testing.assert_array_equal(logits(1, False), logits(2, False))


def test_bfloat16_keeps_float32_logits_and_loss():
    model, variables = PoolFormerForImageClassification(TWO_STAGES, dtype=jnp.bfloat16), random_variables(TWO_STAGES)[1]
    output = jax.eval_shape(model.apply, variables, pixels(2, 64, 64, 3), labels=jnp.array([0, 1]))
    assert {state.dtype for state in output.hidden_states} == {jnp.dtype("bfloat16")}
    assert output.logits.dtype == output.loss.dtype == jnp.float32


def test_initial_values_are_the_authors():
    config = PoolFormerConfig.from_variant("s12", num_labels=200, depths=(1, 1, 1, 1))
    model = PoolFormerForImageClassification(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    block = params["stages_3"]["blocks_0"]
    # PyTorch's default for a convolution: uniform within 1 / sqrt(fan_in), standard deviation 1 / sqrt(3 * fan_in).
    for conv, fan_in in ((params["stem"]["conv"], 7 * 7 * 3), (params["stages_1"]["downsample"]["conv"], 3 * 3 * 64)):
        for leaf in (conv["kernel"], conv["bias"]):
            assert 0.8 < np.abs(leaf).max() * np.sqrt(fan_in) <= 1
        np.testing.assert_allclose(np.std(conv["kernel"]), 1 / np.sqrt(3 * fan_in), rtol=0.03)
    # timm's trunc_normal_(std=0.02) cuts at ±2, not at two standard deviations.
    for kernel in (block["mlp"]["fc1"]["kernel"], block["mlp"]["fc2"]["kernel"], params["head"]["kernel"]):
        np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.02)
        assert 0.08 < np.abs(kernel).max() < 0.2
    assert not np.any(block["mlp"]["fc1"]["bias"]) and not np.any(params["head"]["bias"])
    np.testing.assert_array_equal(block["layer_scale_1"]["scale"], np.float32(1e-5))
    np.testing.assert_array_equal(block["norm1"]["scale"], 1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 224, 224), r"PyTorch's NCHW: use pixel_values.transpose\(0, 2, 3, 1\)"),
        ((1, 64, 64, 4), r"Expected \[batch, height, width, 3\], because config.num_channels=3"),
        ((1, 31, 64, 3), "at least 32 pixels"),
        ((64, 64, 3), r"add the batch axis with pixel_values\[None\]"),
    ],
)
@pytest.mark.parametrize("model", [PoolFormerModel(TINY), PoolFormerForImageClassification(TINY)])
def test_pixels_of_a_wrong_shape_get_one_clear_message(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("dtype", ["junk", "int8", "float16", np.uint8, None])
@pytest.mark.parametrize("model", [PoolFormerModel, PoolFormerForImageClassification])
def test_a_dtype_that_feature_maps_cannot_have_is_refused(model, dtype):
    with pytest.raises(ValueError, match=r"dtype=.*: expected float32 or bfloat16"):
        model(TINY, dtype=dtype)


def test_a_name_in_place_of_a_config_is_refused():
    with pytest.raises(ValueError, match=r"config='s12': expected a PoolFormerConfig.*from_variant\('s12'\)"):
        check_config("s12")  # as the networks do, whose annotation refuses it here


@pytest.mark.parametrize("fused", [True, False])
def test_an_image_too_small_for_a_network_without_padding_is_refused(fused):
    model = PoolFormerForImageClassification(dataclasses.replace(TINY, padding=(0, 0, 0, 0)), fused=fused)
    init = partial(jax.eval_shape, model.init, jax.random.key(0))
    with pytest.raises(ValueError, match="at least 63 pixels"):
        init(jax.ShapeDtypeStruct((1, 62, 62, 3), jnp.float32))
    init(jax.ShapeDtypeStruct((1, 63, 63, 3), jnp.float32))


@pytest.mark.parametrize(
    "labels",
    [
        np.zeros(3, np.int32),  # another batch
        np.zeros((2, 1), np.int32),  # would be broadcast
        np.zeros(2, np.float32),
        np.zeros((2, 4), np.float32),
        np.zeros((3, 5), np.float32),
        np.int32(0),
    ],
    ids=lambda labels: f"{labels.shape} {labels.dtype}",
)
def test_labels_of_a_wrong_shape_get_one_clear_message(labels):
    model = PoolFormerForImageClassification(TINY)
    with pytest.raises(ValueError, match=r"labels has shape .* for a batch of 2 and 5 classes\. Expected whole num"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 64, 64, 3)), jnp.asarray(labels))


def of_problem(problem_type, num_labels=3):
    return dataclasses.replace(TWO_STAGES, num_labels=num_labels, problem_type=problem_type)


# What torch computes for these logits: mse_loss, cross_entropy(ignore_index=-100), binary_cross_entropy_with_logits.
LOGITS = jnp.array([[2.0, -1.0, 0.5], [0.0, 1.0, -3.0]])
SINGLE, MULTI = np.array([2, -100]), np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("config", "logits", "labels", "expected"),
    [
        (of_problem(None), LOGITS, SINGLE, np.log(np.exp([2, -1, 0.5]).sum()) - 0.5),
        (of_problem("single_label_classification"), LOGITS, SINGLE, np.log(np.exp([2, -1, 0.5]).sum()) - 0.5),
        (of_problem("multi_label_classification"), LOGITS, MULTI, np.mean(np.log1p(np.exp((1 - 2 * MULTI) * LOGITS)))),
        (of_problem("regression"), LOGITS, MULTI, np.mean((MULTI - LOGITS) ** 2)),
        (of_problem("regression", 1), LOGITS[:, :1], np.array([1.0, 3.0]), 5.0),
        (of_problem(None, 1), LOGITS[:, :1], np.array([[1], [3]]), 5.0),
    ],
    ids=["indices", "single label", "multi-label", "regression", "regression of one number", "one label"],
)
def test_the_loss_is_that_of_the_problem(config, logits, labels, expected):
    np.testing.assert_allclose(mean_loss(config, logits, jnp.asarray(labels)), expected, rtol=1e-6)


def test_images_without_a_label_have_no_gradient_and_the_others_have_theirs():
    gradient = jax.grad(lambda logits: mean_loss(TWO_STAGES, logits, jnp.array([1, -100])))(LOGITS[:, :2])
    alone = jax.grad(lambda logits: mean_loss(TWO_STAGES, logits, jnp.array([1])))(LOGITS[:1, :2])
    np.testing.assert_allclose(gradient, jnp.concatenate([alone, jnp.zeros((1, 2))]), rtol=1e-6)
    assert np.isnan(mean_loss(TWO_STAGES, LOGITS, jnp.array([-100, -100])))


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_indices_are_refused_by_other_problems(problem):
    with pytest.raises(ValueError, match=r"labels has shape \(2,\) .* Expected (a 0 or 1|numbers)"):
        mean_loss(of_problem(problem), LOGITS, jnp.array([0, 1]))


def test_outputs_are_read_by_name_and_by_position():
    logits, maps = jnp.ones((2, 5)), (jnp.zeros((2, 8, 8, 8)), jnp.zeros((2, 4, 4, 12)))
    output = ImageClassifierOutput(loss=None, logits=logits, hidden_states=maps)
    assert list(output) == list(output.keys()) == ["logits", "hidden_states"]
    assert output[0] is output["logits"] is output.to_tuple()[0] is logits
    assert output[:2] == output.to_tuple() and output[-1] is maps and len(output) == 2
    assert "loss" not in output and output.get("loss") is None
    with_loss = output.replace(loss=jnp.float32(3))
    assert with_loss[0] == with_loss["loss"] == 3
    assert jax.tree.structure(jax.tree.map(lambda x: x, output)) == jax.tree.structure(output)
    assert PoolFormerModelOutput(maps[-1], maps)[0] is maps[-1]


def test_a_network_without_head_takes_no_labels():
    model = PoolFormerForImageClassification(dataclasses.replace(TINY, num_labels=0))
    with pytest.raises(ValueError, match=r"no head \(num_labels=0\)\. Expected labels=None"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 64, 64, 3)), jnp.zeros(2, jnp.int32))


def test_a_config_accepts_the_mixers_activations_and_norms_that_are_implemented():
    assert set(config_fields.HIDDEN_ACTS) == set(ACTIVATIONS)
    assert set(MIXER_PARAMETERS) == set(TOKEN_MIXERS)
    assert set(config_fields.NORMS) == set(NORMS)


def test_attention_says_how_many_channels_it_needs():
    with pytest.raises(ValueError, match=r"hidden_sizes=.*: expected a multiple of 32, the channels of a head"):
        dataclasses.replace(TINY, token_mixers=("attention",) * 4)


def test_one_compilation_serves_every_call_of_a_shape():
    _, variables = random_variables(TWO_STAGES)
    calls = jax.jit(PoolFormerForImageClassification(TWO_STAGES).apply)
    for seed in range(3):
        calls(variables, pixels(2, 64, 64, 3, seed=seed))
    assert calls._cache_size() == 1


def test_random_matrices_fix_the_number_of_positions():
    config = family_weights.config("sail", "randformer_tiny")
    variables = family_weights.variables("sail", config, "float32")
    model = MetaFormerForImageClassification(config)
    jax.eval_shape(model.apply, variables, pixels(1, 32, 128, 3))  # as many positions in other places
    with pytest.raises(ValueError, match=r"images of 64 by 64 pixels\. Resize the images"):
        jax.eval_shape(model.apply, variables, pixels(1, 96, 96, 3))
