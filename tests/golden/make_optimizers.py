"""Makes optimizers.npz: 20 updates of timm's optimizers, and of its running mean of the weights, in float64.

    PYTHONPATH=tests python -m golden.make_optimizers

Needs torch and timm. `tests/live/test_optimizers.py` compares timm itself.
"""

import importlib
from pathlib import Path

import numpy as np

from golden.fixture_values import parameter, uniform
from live import peers

STEPS = 20
# A matrix and a convolution kernel decay; a bias, a gain and a vector of zeros do not.
SHAPES = {"fc.weight": (6, 5), "conv.weight": (4, 3, 3, 3), "fc.bias": (6,), "norm.weight": (5,), "zero.weight": (3, 4)}
WEIGHT_DECAY = 0.05
# Our name -> timm's name and peak learning rate.
OPTIMIZERS = {"adamw": ("adamw", 4e-3), "lamb": ("lamb", 8e-3), "lion": ("lion", 3e-4), "sgd": ("sgd", 0.1)}
EMA_DECAY = 0.9


def initial() -> dict[str, np.ndarray]:
    """The parameters before the first step; one is zero, for which a trust ratio is not defined."""
    return {
        name: np.zeros(shape) if name.startswith("zero") else parameter(name, shape).astype(np.float64)
        for name, shape in SHAPES.items()
    }


def gradients(step: int) -> dict[str, np.ndarray]:
    """The gradient of a step: its norm is below 1 in half of the steps, and above in the others."""
    size = 3.0 if step % 2 else 0.05
    return {name: size * uniform(f"optimizer/{step}/{name}", shape) for name, shape in SHAPES.items()}


def learning_rate(step: int, peak: float) -> float:
    """A warm-up of five steps, then a constant rate."""
    return peak * min(step + 1, 5) / 5


def run(name: str) -> dict[str, np.ndarray]:
    """The parameters after 20 steps, and both running means of them, as "params/NAME", "ema/NAME", "warm_ema/NAME"."""
    import torch

    peers.timm()
    optim, utils = (importlib.import_module(f"timm.{module}") for module in ("optim", "utils"))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for key, value in initial().items():
                self.register_parameter(key.replace(".", "_"), torch.nn.Parameter(torch.from_numpy(value.copy())))

    theirs, peak = OPTIMIZERS[name]
    model = Model()
    optimizer = optim.create_optimizer_v2(model, opt=theirs, lr=peak, weight_decay=WEIGHT_DECAY)
    means = {
        "ema": utils.ModelEmaV3(model, decay=EMA_DECAY),
        "warm_ema": utils.ModelEmaV3(model, decay=EMA_DECAY, use_warmup=True),
    }
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak)
        for key, value in gradients(step).items():
            getattr(model, key.replace(".", "_")).grad = torch.from_numpy(value)
        optimizer.step()
        for mean in means.values():
            mean.update(model, step=step + 1 if mean.use_warmup else None)
    modules = {"params": model} | {kind: mean.module for kind, mean in means.items()}
    return {
        f"{kind}/{key}": getattr(module, key.replace(".", "_")).detach().numpy()
        for kind, module in modules.items()
        for key in SHAPES
    }


def main() -> None:
    arrays = {f"{name}/{key}": value for name in OPTIMIZERS for key, value in run(name).items()}
    np.savez_compressed(Path(__file__).parent / "optimizers.npz", **arrays)


if __name__ == "__main__":
    main()
