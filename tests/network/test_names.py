"""The tables say what PyTorch says: names, shapes and order of every state dict, and the model's own tree."""

from collections import Counter

import jax
import numpy as np
import pytest

from golden import published
from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerModel
from poolformer_jax.network import merge_collections
from poolformer_jax.weights.names import LAYOUTS, MLP, TRANSFORMS, leaves, parameter_rows

TINY = {"depths": (1, 2), "hidden_sizes": (4, 6), "num_labels": 3}
TINY |= {"patch_sizes": (7, 3), "strides": (4, 2), "padding": (2, 1), "token_mixers": ("pooling",) * 2}
TINY |= {"position_embeddings": (False, False)}


@pytest.mark.parametrize("variant", published.VARIANTS)
@pytest.mark.parametrize("layout", published.LAYOUTS)
def test_names_shapes_and_their_order_are_those_of_the_state_dict(layout, variant):
    here = [(leaf.name, leaf.stored_shape) for leaf in leaves(PoolFormerConfig.from_variant(variant), layout)]
    assert here == list(published.shapes(layout, variant).items())


@pytest.mark.parametrize("listing", sorted((published.FOLDER / "family").glob("*_s1[28].json")), ids=lambda p: p.stem)
def test_names_shapes_and_their_order_are_those_of_the_second_papers_state_dicts(listing):
    layout, variant = listing.stem.split("_", 1)
    here = [(leaf.name, leaf.stored_shape) for leaf in leaves(PoolFormerConfig.from_variant(variant), layout)]
    assert here == list(published.shapes(f"family/{layout}", variant).items())


FAMILY = ("poolformerv2_s12", "randformer_s12", "convformer_s18", "caformer_s18")


@pytest.mark.parametrize("variant", ["s12", *published.ABLATIONS, *FAMILY])
def test_paths_and_shapes_are_those_of_the_model(variant):
    # The blocks of a stage are alike: two of them show that they are counted.
    config = PoolFormerConfig.from_variant(variant, depths=(1, 2, 1, 1))
    for classifier, model in ((True, PoolFormerForImageClassification), (False, PoolFormerModel)):
        if not classifier and variant != "s12":
            continue
        pixels = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
        variables = jax.eval_shape(model(config).init, jax.random.key(0), pixels)
        flat, _ = jax.tree.flatten_with_path(merge_collections(variables))
        shapes = {"/".join(key.key for key in path): leaf.shape for path, leaf in flat}
        assert {leaf.path: leaf.shape for leaf in leaves(config, classifier=classifier)} == shapes


@pytest.mark.parametrize(("layout", "variant"), [*((layout, "m48") for layout in LAYOUTS), ("sail", "caformer_s18")])
def test_a_table_pairs_each_path_with_one_name(layout, variant):
    config = PoolFormerConfig.from_variant(variant)
    rows = [row for group in LAYOUTS[layout].for_network(config).groups for row in group]
    assert max(Counter(row.path for row in rows).values()) == 1
    assert max(Counter(row.name for row in rows).values()) == 1
    assert {row.path for row in rows} <= parameter_rows().keys()
    assert {row.transform for row in rows} <= {*TRANSFORMS, MLP}
    every = leaves(config, layout)
    assert len({leaf.name for leaf in every}) == len({leaf.path for leaf in every}) == len(every)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_and_its_inverse_move_no_value(name):
    there = {"same": (5,), "conv": (5, 4, 3, 2), "pointwise": (5, 4, 1, 1), "linear": (5, 4), "position": (1, 4, 3, 2)}
    stored = np.random.default_rng(0).normal(size=there[name])
    here = TRANSFORMS[name].to_tree(stored)
    assert np.shares_memory(here, stored)
    np.testing.assert_array_equal(TRANSFORMS[name].to_layout(here), stored, strict=True)


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        # metaformer.py: the position embedding is appended before the blocks of its stage.
        ("metaformer_pppa_s12_224", {"network.5.proj.weight", "network.6.pos_embed", "network.7.0.norm1.weight"}),
        ("metaformer_ppaa_s12_224", {"network.4.pos_embed", "network.5.5.mlp.fc2.bias", "network.6.proj.bias"}),
        ("metaformer_ppff_s12_224", {"network.4.0.token_mixer.fc.weight", "network.6.1.token_mixer.fc.weight"}),
        ("metaformer_id_s12", {"network.6.1.norm2.bias"}),
    ],
)
def test_sails_list_counts_position_embeddings(variant, names):
    assert names <= {leaf.name for leaf in leaves(PoolFormerConfig.from_variant(variant), "sail")}


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"num_labels": 0}, {"head.weight", "head.bias"}),
        ({"use_layer_scale": False}, {"network.0.0.layer_scale_1", "network.2.1.layer_scale_2"}),
    ],
)
def test_absent_parameters_have_no_name(changes, absent):
    whole = {leaf.name for leaf in leaves(PoolFormerConfig(**TINY), "sail")}
    part = {leaf.name for leaf in leaves(PoolFormerConfig(**TINY | changes), "sail")}
    assert absent <= whole
    assert not absent & part


@pytest.mark.parametrize(
    ("layout", "variant", "message"),
    [
        ("hf", "metaformer_pppa_s12_224", "stages_3/position_embedding, .* and 4 more: .* has: 'sail', 'jax'"),
        ("timm", "metaformer_pppa_s12_224", "stages_3/position_embedding, .*proj/bias: .* has: 'sail', 'jax'"),
        ("hf", "caformer_s18", "stem/norm/scale, .* has: 'sail', 'timm', 'jax'"),
    ],
)
def test_the_message_names_parameters_without_a_name_in_the_layout(layout, variant, message):
    with pytest.raises(ValueError, match=f"'{layout}' has no name for {message}"):
        leaves(PoolFormerConfig.from_variant(variant), layout)
