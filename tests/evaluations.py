"""Small models, class folders, and `python -m train evaluate` in this process."""

import numpy as np
from PIL import Image
from rich.console import Console

from poolformer_jax import PoolFormerConfig, PoolFormerImageProcessor, save_pretrained
from small_networks import random_variables
from train.commands.evaluate import run_evaluation
from train.commands.evaluate_config import EvaluateConfig
from training import ALONE

PROCESSOR = PoolFormerImageProcessor(
    size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, crop_pct=None, image_mean=(0.5,) * 3
)


def write_model(folder, labels):
    """Writes an untrained model with these classes (or this number of them) to `folder`; returns its path."""
    id2label = None if isinstance(labels, int) else dict(enumerate(labels))
    config = PoolFormerConfig(
        depths=(1,) * 4, hidden_sizes=(2, 4, 6, 8), num_labels=len(id2label or range(labels)), id2label=id2label
    )
    model, variables = random_variables(config)
    save_pretrained(folder, model, variables, image_processor=PROCESSOR)
    return str(folder)


def write_classes(root, names, images=20):
    """Writes a folder of images for each class; returns `root`."""
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(images):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def evaluate(model, data, **options):
    """The evaluation of the model in a folder on the data."""
    config = EvaluateConfig(source=model, data=data, batch_size=16, workers=0, distributed=ALONE, **options)
    return run_evaluation(config, Console(quiet=True))
