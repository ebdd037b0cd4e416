"""The networks that the first paper's abstract compares with PoolFormer-M36."""

from poolformer_jax.inference import count_macs
from poolformer_jax.network import BASELINES, PoolFormerConfig, count_parameters

WIDTH, HIDDEN, LABELS = 768, 3072, 1000
PATCHES, PATCH = 14 * 14, 16 * 16 * 3


def dense(inputs, outputs):
    return inputs * outputs + outputs


def mlp():
    return dense(WIDTH, HIDDEN) + dense(HIDDEN, WIDTH)


def test_deit_b_is_counted_by_its_definition():
    tokens = PATCHES + 1  # the class token
    block = 2 * 2 * WIDTH + dense(WIDTH, 3 * WIDTH) + dense(WIDTH, WIDTH) + mlp()
    parameters = dense(PATCH, WIDTH) + WIDTH + tokens * WIDTH + 12 * block + 2 * WIDTH + dense(WIDTH, LABELS)
    products = 4 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH + 2 * tokens * WIDTH * HIDDEN
    norms = 25 * 5 * tokens * WIDTH  # fvcore counts five for each element
    macs = PATCHES * PATCH * WIDTH + 12 * products + norms + WIDTH * LABELS
    assert BASELINES["DeiT-B"][:2] == (parameters, macs)


def test_resmlp_b24_is_counted_by_its_definition():
    block = 2 * 2 * WIDTH + dense(PATCHES, PATCHES) + mlp() + 2 * WIDTH  # affine layers, two scales
    parameters = dense(PATCH, WIDTH) + 24 * block + 2 * WIDTH + dense(WIDTH, LABELS)
    products = PATCHES**2 * WIDTH + 2 * PATCHES * WIDTH * HIDDEN
    macs = PATCHES * PATCH * WIDTH + 24 * products + WIDTH * LABELS
    assert BASELINES["ResMLP-B24"][:2] == (parameters, macs)


def test_m36_has_as_many_fewer_parameters_and_macs_as_the_guide_says():
    m36 = PoolFormerConfig.from_variant("m36")
    fewer = {
        name: [
            round(100 * (1 - own / other), 1) for own, other in zip((count_parameters(m36), count_macs(m36)), counts)
        ]
        for name, counts in BASELINES.items()
    }
    assert fewer == {"DeiT-B": [35.1, 49.9], "ResMLP-B24": [51.5, 61.8]}
