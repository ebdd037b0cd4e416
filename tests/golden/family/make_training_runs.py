"""Makes training_runs.npz: 20 steps of small networks by timm, with the optimizers of the authors' recipes, in float64.

    PYTHONPATH=tests python -m golden.family.make_training_runs

Needs torch and timm. `tests/live/test_optimizers.py` compares timm itself.
"""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from golden.fixture_values import parameter, uniform
from live import peers

STEPS, LABELS = 20, 10
SMOOTHING = 0.1


class Run(NamedTuple):
    """One run. The cosine has a warm-up of five steps; without it the learning rate is constant."""

    kind: str
    optimizer: str
    learning_rate: float
    cosine: bool
    ema_decay: float | None = None


RUNS = {
    "convformer": Run("convformer", "adamw", 4e-3, cosine=True),
    "caformer": Run("caformer", "lamb", 8e-3, cosine=True),
    "caformer_384": Run("caformer", "lamb", 1e-4, cosine=False, ema_decay=0.9999),
}


def pixels(step: int) -> np.ndarray:
    """[8, 3, 64, 64]: one of four batches."""
    return 1.5 * uniform(f"train/pixels/{step % 4}", (8, 3, 64, 64))


def labels(step: int) -> np.ndarray:
    return (np.arange(8) * 7 + step % 4) % LABELS


def network(kind: str) -> Any:
    """timm's network with depths (1, 1, 1, 1), in float64, with the weights of the golden arrays."""
    import torch

    peers.timm()
    homes = importlib.import_module("timm.models.metaformer")
    mixers = [homes.SepConv] * 2 + [homes.Attention if kind == "caformer" else homes.SepConv] * 2
    positions = homes.LayerNormNoBias if kind == "caformer" else homes.LayerNorm2dNoBias
    model = homes.MetaFormer(
        depths=(1, 1, 1, 1),
        dims=(8, 16, 32, 64),
        num_classes=LABELS,
        token_mixers=mixers,
        norm_layers=[homes.LayerNorm2dNoBias] * 2 + [positions] * 2,
    )
    weights = {name: torch.from_numpy(parameter(name, tuple(t.shape))) for name, t in model.state_dict().items()}
    model.load_state_dict(weights)
    return model.double().train()


def train(name: str) -> dict[str, np.ndarray]:
    """Per step "learning_rate", "loss" and "grad_norm", and the L2 norms of the last arrays and of their mean."""
    import torch

    run = RUNS[name]
    model = network(run.kind)
    optim, utils, scheduler = (importlib.import_module(f"timm.{part}") for part in ("optim", "utils", "scheduler"))
    optimizer = optim.create_optimizer_v2(model, opt=run.optimizer, lr=run.learning_rate, weight_decay=0.05)
    schedule = scheduler.CosineLRScheduler(optimizer, STEPS, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    mean = utils.ModelEmaV2(model, decay=run.ema_decay or 0.0)
    loss_function = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    rows: dict[str, list[float]] = {"learning_rate": [], "loss": [], "grad_norm": []}
    for step in range(STEPS):
        if run.cosine:
            schedule.step(step)
        else:
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate
        loss = loss_function(model(torch.from_numpy(pixels(step))), torch.from_numpy(labels(step)))
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        rows["learning_rate"].append(optimizer.param_groups[0]["lr"])
        rows["loss"].append(loss.item())
        rows["grad_norm"].append(torch.stack([torch.linalg.vector_norm(g) for g in gradients]).norm().item())
        optimizer.step()
        mean.update(model)
    arrays = {key: np.array(values) for key, values in rows.items()}
    for kind, module in {"final": model, **({"ema": mean.module} if run.ema_decay else {})}.items():
        arrays |= {f"{kind}_l2/{key}": t.norm().numpy() for key, t in module.state_dict().items()}
    return arrays


def main() -> None:
    runs = {f"{name}/{key}": value for name in RUNS for key, value in train(name).items()}
    # One array each: hundreds of tiny ones would take ten times the space.
    keys, values = zip(*((f"{key}/{i}", v) for key, value in runs.items() for i, v in enumerate(np.ravel(value))))
    np.savez_compressed(Path(__file__).parent / "training_runs.npz", keys=np.array(keys), values=np.array(values))


if __name__ == "__main__":
    main()
