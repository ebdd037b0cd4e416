"""A small network, its arrays, and a saved folder for the tests of loading and saving."""

import jax
import numpy as np

from golden.fixture_values import parameter
from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
from poolformer_jax.weights import leaves, save_pretrained

LABELS = {0: "cat", 1: "dog", 2: "axolotl"}
CONFIG = PoolFormerConfig(depths=(1, 1, 2, 1), hidden_sizes=(2, 4, 6, 8), num_labels=3, id2label=LABELS)
PROCESSOR = PoolFormerImageProcessor(crop_pct=0.875, image_mean=(0.5, 0.5, 0.5))


def make_variables(config):
    tree = {}
    for leaf in leaves(config):
        *parents, last = leaf.path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = parameter(leaf.path, leaf.shape)
    return {"params": tree}


def same(first, second):
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b) and a.dtype == b.dtype, first, second))


def save(folder, layout="jax", config=CONFIG, **options):
    variables = make_variables(config)
    save_pretrained(folder, PoolFormerForImageClassification(config), variables, layout, **options)
    return variables
