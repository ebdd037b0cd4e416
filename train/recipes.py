"""The recipes: values of TrainConfig that are known to work. `python -m train NAME` runs one.

The ImageNet recipes are the authors' training (sail-sg/poolformer: the defaults of train.py, and the README's drop-path
rates), written out.
"""

import dataclasses
from pathlib import Path

from poolformer_jax import PoolFormerImageProcessor
from poolformer_jax.network import SIZES
from train.config import FreshNetwork, OptimizerConfig, PretrainedNetwork, TrainConfig
from train.data import DIGITS, DataConfig, DeviceAugmentation, HostAugmentation


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run that is known to work."""

    summary: str
    details: str
    config: TrainConfig


def _imagenet(variant: str, drop_path_rate: float) -> Recipe:
    """The authors' ImageNet-1k training of one size."""
    published, crop_pct = SIZES[variant], PoolFormerImageProcessor.for_variant(variant).crop_pct
    # Forward and backward cost three forward passes of two operations per multiply-add. An estimate.
    images = 310 * 1_281_167
    hours = images * published.macs_g * 1e9 * 6 / (0.25 * 16 * 275e12) / 3600
    return Recipe(
        summary=f"PoolFormer-{variant.upper()} on ImageNet-1k, as the authors train it",
        details=f"""
        PoolFormer-{variant.upper()} on ImageNet-1k as the authors train it: 300 epochs and 10 of cool-down, AdamW at
        1e-3 per 1024 images, RandAugment, mixup, cutmix, random erasing, drop path {drop_path_rate}.

        Command:  python -m train imagenet-{variant} --data.source tfds:imagenet2012

        Expected: {published.top_1} % top-1 at 224 pixels, the authors' result (README of sail-sg/poolformer); this
        program has not been run to the end on ImageNet. About {hours:.1f} hours on a TPU v4-32 if its 16 chips reach a
        quarter of their peak and the hosts keep up: an estimate from the number of operations, not a measurement.
        """,
        config=TrainConfig(
            run_dir=Path(f"runs/imagenet-{variant}"),
            model=FreshNetwork.from_variant(variant, drop_path_rate=drop_path_rate),
            # Each of the authors' 8 GPUs drew one mixing ratio for its 128 images.
            data=DataConfig(source="tfds:imagenet2012", crop_pct=crop_pct, mix=DeviceAugmentation(mix_group=128)),
            optimizer=OptimizerConfig(),
            # The authors use float16 (--apex-amp); bfloat16 needs no loss scaling.
            dtype="bfloat16",
        ),
    )


_SMALL = FreshNetwork(
    depths=(2, 2),
    hidden_sizes=(32, 64),
    patch_sizes=(7, 3),
    strides=(4, 2),
    padding=(2, 1),
    token_mixers=("pooling",) * 2,
    position_embeddings=(False,) * 2,
    layer_scale_init_value=1e-1,
)

DIGITS_RECIPE = Recipe(
    summary="a small PoolFormer on scikit-learn's digits, in a minute",
    details="""
    A small PoolFormer on scikit-learn's 1,797 scans of handwritten digits, which come with the package. The scans are
    8 x 8 pixels, enlarged to 32 x 32; a fifth of them is held out.

    Command:  python -m train
    """,
    config=TrainConfig(
        run_dir=Path("runs/digits"),
        model=_SMALL,
        data=dataclasses.replace(DIGITS, batch_size=64),
        optimizer=OptimizerConfig(
            learning_rate=3e-3,
            learning_rate_batch=None,
            epochs=40,
            warmup_epochs=3,
            cooldown_epochs=0,
            schedule_every="step",
        ),
        log_every=11,
        evaluate_every=5,
        save_every=220,
    ),
)

_FINETUNE = Recipe(
    summary="published or trained weights, fine-tuned to your own images",
    details="""
    Published or trained weights with a new head, fine-tuned to the classes of your own images: a small learning rate
    that falls further with the distance from the head, few epochs, gentle augmentation.

    Command:  python -m train finetune --model.source sail/poolformer_s12 --data.source folder:PATH

    Take a larger --data.image-size for small details: the network takes any. See docs/fine-tuning.md.
    """,
    config=TrainConfig(
        run_dir=Path("runs/finetune"),
        model=PretrainedNetwork(),
        data=DataConfig(
            source="folder:PATH",
            batch_size=128,
            augment=HostAugmentation(crop_scale=(0.35, 1.0), interpolation="bicubic", scaled_decoding=False),
            mix=DeviceAugmentation(mixup=0.0, cutmix=0.0, erase_probability=0.1),
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-4,
            learning_rate_batch=128,
            epochs=20,
            warmup_epochs=1,
            cooldown_epochs=0,
            schedule_every="step",
            layer_decay=0.85,
            clip_norm=1.0,
        ),
        log_every=10,
    ),
)

_SMOKE = Recipe(
    summary="a few steps that test everything on this machine",
    details="""
    A few steps of a small network on made-up images, through everything that a long run needs: all devices and
    processes, augmentation, evaluation, checkpoints, the final folder. The result means nothing.

    Command:  python -m train smoke
    """,
    config=TrainConfig(
        run_dir=Path("runs/smoke"),
        model=dataclasses.replace(_SMALL, drop_path_rate=0.1),
        data=DataConfig(
            source="synthetic", image_size=32, batch_size=64, synthetic_examples=256, crop_pct=None, workers=0
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, learning_rate_batch=None, epochs=4, warmup_epochs=1, cooldown_epochs=1, ema_decay=0.9
        ),
        log_every=2,
        save_every=4,
        example_images=2,
    ),
)

RECIPES: dict[str, Recipe] = {
    "digits": DIGITS_RECIPE,
    "imagenet-s12": _imagenet("s12", drop_path_rate=0.1),
    "imagenet-s24": _imagenet("s24", drop_path_rate=0.1),
    "imagenet-s36": _imagenet("s36", drop_path_rate=0.2),
    "imagenet-m36": _imagenet("m36", drop_path_rate=0.3),
    "imagenet-m48": _imagenet("m48", drop_path_rate=0.4),
    "finetune": _FINETUNE,
    "smoke": _SMOKE,
}
