"""Outputs of compiled networks, for comparison with golden arrays. Networks that differ in the head share a program."""

import dataclasses
from functools import cache, partial

import jax
import numpy as np

from poolformer_jax import MetaFormerForImageClassification
from poolformer_jax.network.heads import classify


@cache
def _network(config, dtype):
    return jax.jit(MetaFormerForImageClassification(config, dtype=dtype).apply)


@cache
def _head(config):
    return jax.jit(partial(classify, config))


def outputs(config, variables, pixels, dtype, **head):
    """Feature maps and logits; `head` are the fields of the shared program's head."""
    shared = dataclasses.replace(config, **head)
    output = _network(shared, dtype)(variables, pixels)
    if config == shared:
        return output.hidden_states, output.logits
    return output.hidden_states, _head(config)(variables["params"], output.hidden_states[-1])


def relative_error(actual, expected):
    return np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()
