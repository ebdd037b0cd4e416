"""Devices whose kernels fail, for tests of what uses kernels."""

from collections.abc import Iterator

import jax
import pytest

from poolformer_jax.network.fused.kernels import verification


def devices_with_kernels(kind: type, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives the devices of this machine interpreted kernels of `kind`."""
    monkeypatch.setattr(verification, "kernels_for", lambda mesh, axes: kind(mesh, axes, interpret=True))
    jax.clear_caches()
    yield
    jax.clear_caches()


def halve_branch(kind, module, monkeypatch):
    """The kernels of `module` compute half of the MLP's branch."""
    right = module.forward

    def forward(maps, vectors, weights, **options):
        mean, inverse_std, keep = vectors
        return right(maps, (mean, inverse_std, 0.5 * keep), weights, **options)

    monkeypatch.setattr(module, "forward", forward)


def refuse(kind, module, monkeypatch):
    """The compiler refuses every kernel."""

    def call(*arguments):
        raise NotImplementedError("this compiler knows no such instruction")

    monkeypatch.setattr(kind, "call", call)


def lose_compiler(kind, module, monkeypatch):
    """This jax has no compiler for kernels."""

    def call(*arguments):
        raise ImportError("cannot import name 'triton' from 'jax.experimental.pallas'")

    monkeypatch.setattr(kind, "call", call)


FAILURES = pytest.mark.parametrize(
    ("fail", "problem"),
    [
        (halve_branch, "the results of mlp_residual in stage 0 differ from XLA's by"),
        (refuse, "_residual cannot run: NotImplementedError: this compiler knows no such instruction"),
        pytest.param(lose_compiler, "_residual cannot run: ImportError", marks=pytest.mark.slow),
    ],
    ids=["differs", "raises", "no compiler"],
)
