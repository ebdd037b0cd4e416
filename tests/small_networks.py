"""What the tests of inference share: photographs, and small networks with parameters of ordinary size everywhere."""

from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
from poolformer_jax.network import all_parameters, variables_of

IMAGES = Path(__file__).parent / "images"
PHOTOGRAPHS = sorted(path for path in IMAGES.iterdir() if path.suffix in (".jpg", ".png"))

TINY = {"depths": (1, 2, 1, 1), "hidden_sizes": (32, 32, 64, 64), "num_labels": 7}
# Pooling and group norm throughout, for what compiles long.
TWO_STAGES = PoolFormerConfig(
    depths=(2, 1),
    hidden_sizes=(8, 12),
    patch_sizes=(7, 3),
    strides=(4, 2),
    padding=(2, 1),
    token_mixers=("pooling",) * 2,
    position_embeddings=(False,) * 2,
    num_labels=5,
)
# One stage of each: what the published ablations combine.
EVERY_MIXER = ("pooling", "identity", "attention", "spatial_fc")

# A small network of each kind of the second paper, for images of 64 x 64 pixels.
FAMILY = {
    kind: PoolFormerConfig.from_variant(
        variant,
        depths=(1, 1, 1, 1),
        hidden_sizes=(32, 32, 64, 64),
        num_labels=7,
        **({"image_size": 64} if kind == "randformer" else {}),
    )
    for kind, variant in (
        ("poolformerv2", "poolformerv2_s12"),
        ("identityformer", "identityformer_s12"),
        ("randformer", "randformer_s12"),
        ("convformer", "convformer_s18"),
        ("caformer", "caformer_s18"),
    )
}

# Its two mixers, a stage of each.
TWO_STAGE_CAFORMER = PoolFormerConfig.from_variant(
    "caformer_s18",
    depths=(1, 1),
    hidden_sizes=(64, 64),
    patch_sizes=(7, 3),
    strides=(4, 2),
    padding=(2, 1),
    token_mixers=("sep_conv", "attention"),
    residual_scale_init_values=(None, 1.0),
    drop_path_rate=0.3,
    num_labels=7,
)


@lru_cache
def random_variables(config, key=0):
    """A model, and parameters drawn so that no gain, shift or layer scale goes unnoticed.

    As initialised, gains are 1, shifts 0 and layer scales next to 0: much could be forgotten without a test noticing.
    What is returned is shared between tests, which leave it as it is.
    """
    rng, leaves = np.random.default_rng(key), {}
    for parameter in sorted(all_parameters(config), key=lambda parameter: parameter.path.split("/")):
        name = parameter.path.split("/")[-1]
        values = rng.standard_normal(parameter.shape)
        if name == "kernel":
            values = values * np.prod(parameter.shape[:-1]) ** -0.5
        else:
            values = 0.7 + 0.3 * values if name == "scale" else 0.3 * values
        leaves[parameter.path] = jnp.asarray(values, jnp.float32)
    return PoolFormerForImageClassification(config), variables_of(config, leaves)


def distance(found, exact):
    """Relative to the whole, over all arrays of a tree."""
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree)))  # noqa: E731
    return norm(jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), found, exact)) / norm(
        exact
    )


# A classifier of 64 x 64 pixels; this key is one whose parameters give the photographs different labels.
LABELS = {index: f"label {index}" for index in range(7)}
CONFIG = PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 8, 16, 16), num_labels=7, id2label=LABELS)
PROCESSOR = PoolFormerImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
MODEL, VARIABLES = random_variables(CONFIG, key=13)
