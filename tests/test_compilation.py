"""Options for XLA are passed on where it has them, and never stop a program from compiling."""

import jax
import jax.numpy as jnp
import pytest

from poolformer_jax import compilation
from poolformer_jax.compilation import compiler_options


@pytest.mark.parametrize("training", [False, True])
def test_programs_compile_with_the_options_of_this_platform(training):
    options = compiler_options("cpu", training=training)
    assert options == (compilation.TRAINING_ON_CPU if training else compilation.ON_CPU)
    assert jax.jit(jnp.sin, compiler_options=options)(0.0) == 0


def test_gpu_programs_round_where_they_say_so():
    assert compiler_options("gpu") == {"xla_allow_excess_precision": False}


def test_tpu_programs_keep_the_defaults():
    assert compiler_options("tpu") is None


def test_an_option_that_xla_does_not_have_is_left_out(monkeypatch):
    known = dict(compilation.ON_CPU)
    monkeypatch.setattr(compilation, "ON_CPU", {"xla_cpu_of_another_version": 1} | known)
    assert compiler_options("cpu") == known
    monkeypatch.setattr(compilation, "ON_CPU", {"xla_cpu_prefer_vector_width": "of another type"})
    assert compiler_options("cpu") is None
