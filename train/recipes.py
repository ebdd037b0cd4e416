"""The recipes: values of TrainConfig that are known to work. `python -m train NAME` runs one.

The ImageNet recipes are the authors' training, written out. Sources: sail-sg/poolformer, the defaults of train.py and
the README's drop-path rates; sail-sg/metaformer, the defaults of train.py and scripts/.
"""

import dataclasses
from pathlib import Path

from poolformer_jax import PoolFormerImageProcessor
from poolformer_jax.network import FAMILIES
from train.config import FreshNetwork, OptimizerConfig, PretrainedNetwork, TrainConfig
from train.data import DIGITS, DataConfig, DeviceAugmentation, HostAugmentation


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run that is known to work."""

    summary: str
    details: str
    config: TrainConfig


# Operations of a TPU v4-32's 16 chips in an hour, if they reach a quarter of their peak.
_OPERATIONS_PER_HOUR = 0.25 * 16 * 275e12 * 3600
_TRAINING_IMAGES = 1_281_167
_TITLES = {name: family.title for family in FAMILIES for name in family.variants}
_RESULTS = {name: results for family in FAMILIES for name, results in family.results.items()}


def _imagenet(
    variant: str, batch_size: int, optimizer: OptimizerConfig, drop_path_rate: float, head_dropout_rate: float = 0.0
) -> Recipe:
    """The authors' training of a published network on ImageNet-1k."""
    network = FreshNetwork.from_variant(variant, drop_path_rate=drop_path_rate, head_dropout_rate=head_dropout_rate)
    title, size = _TITLES[variant], variant.rpartition("_")[2].upper()
    peak = f"{optimizer.learning_rate:.0e}".replace("e-0", "e-")
    return Recipe(
        summary=f"{title} on ImageNet-1k, as the authors train it",
        details=f"""
        {title}-{size} on ImageNet-1k as the authors train it: 300 epochs and 10 of cool-down,
        {_OPTIMIZER_NAMES[optimizer.name]} at {peak} per {optimizer.learning_rate_batch} images, RandAugment, mixup,
        cutmix, random erasing, drop path {drop_path_rate}{_dropout(head_dropout_rate)}.

        Command:  python -m train imagenet-{variant} --data.source tfds:imagenet2012

        {_expected(variant, 0, optimizer.total_epochs)}
        """,
        config=TrainConfig(
            run_dir=Path(f"runs/imagenet-{variant}"),
            model=network,
            data=DataConfig(
                source="tfds:imagenet2012",
                crop_pct=PoolFormerImageProcessor.for_variant(variant).crop_pct,
                batch_size=batch_size,
                # Each of the authors' GPUs drew one mixing ratio for the 128 images of a forward pass.
                mix=DeviceAugmentation(mix_group=128),
            ),
            optimizer=optimizer,
            # The authors use float16 (--apex-amp); bfloat16 needs no loss scaling.
            dtype="bfloat16",
        ),
    )


def _imagenet_384(variant: str, optimizer: OptimizerConfig, drop_path_rate: float, head_dropout_rate: float) -> Recipe:
    """The authors' fine-tuning to images of 384 x 384 pixels, with the same classes."""
    title, size = _TITLES[variant], variant.rpartition("_")[2].upper()
    peak = f"{optimizer.learning_rate:.0e}".replace("e-0", "e-")
    return Recipe(
        summary=f"{title}, fine-tuned at 384 pixels as by the authors",
        details=f"""
        {title}-{size}, trained at 224 pixels, is fine-tuned at 384 pixels as by the authors: 30 epochs,
        {_OPTIMIZER_NAMES[optimizer.name]} at a constant {peak} per {optimizer.learning_rate_batch} images, RandAugment,
        random erasing, no mixing, drop path {drop_path_rate}{_dropout(head_dropout_rate)}, a running mean of the
        weights. The head is kept, so the classes must be those of the weights.

        Command:  python -m train imagenet-{variant}_384 --data.source tfds:imagenet2012

        The weights are those of the recipe imagenet-{variant}; --model.source takes others.
        {_expected(variant, 1, optimizer.total_epochs)}
        """,
        config=TrainConfig(
            run_dir=Path(f"runs/imagenet-{variant}_384"),
            model=PretrainedNetwork(
                source=f"runs/imagenet-{variant}/model",
                keep_head=True,
                drop_path_rate=drop_path_rate,
                head_dropout_rate=head_dropout_rate,
            ),
            data=DataConfig(
                source="tfds:imagenet2012",
                image_size=384,
                crop_pct=1.0,
                mix=DeviceAugmentation(mixup=0.0, cutmix=0.0),
            ),
            optimizer=optimizer,
            dtype="bfloat16",
        ),
    )


_OPTIMIZER_NAMES = {"adamw": "AdamW", "lamb": "LAMB"}


def _dropout(rate: float) -> str:
    return f", head dropout {rate}" if rate else ""


def _expected(variant: str, result: int, epochs: int) -> str:
    """What the authors reached, and how long it takes."""
    published = _RESULTS[variant][result]
    # Forward and backward cost three forward passes of two operations per multiply-add.
    hours = epochs * _TRAINING_IMAGES * published.macs_g * 1e9 * 6 / _OPERATIONS_PER_HOUR
    side = published.image_size
    return f"""Expected: {published.top_1} % top-1 at {side} pixels, the authors' result; this program has not been run
        to the end on ImageNet. About {hours:.1f} hours on a TPU v4-32 if its 16 chips reach a quarter of their peak and
        the hosts keep up: an estimate from the number of operations, not a measurement."""


# Drop path of the first paper's sizes, and of the second paper's networks with the same mixers in all stages.
_DROP_PATH = {"s12": 0.1, "s24": 0.1, "s36": 0.2, "m36": 0.3, "m48": 0.4}
# The second paper's: variant -> optimizer, drop path, head dropout. sail-sg/metaformer, scripts/*/train_*.sh.
_ADAMW = OptimizerConfig(learning_rate=4e-3, learning_rate_batch=4096)
_ADAMW_20 = dataclasses.replace(_ADAMW, warmup_epochs=20)
_LAMB_20 = dataclasses.replace(_ADAMW_20, name="lamb", learning_rate=8e-3)
_SECOND_PAPER = {
    **{
        f"{kind}_{size}": (_ADAMW, rate, 0.0)
        for kind in ("identityformer", "randformer", "poolformerv2")
        for size, rate in _DROP_PATH.items()
    },
    "randformer_m48": (_ADAMW, 0.3, 0.0),
    "convformer_s18": (_ADAMW_20, 0.2, 0.0),
    "convformer_s36": (_ADAMW_20, 0.3, 0.0),
    "convformer_m36": (_ADAMW_20, 0.4, 0.0),
    "convformer_b36": (_ADAMW_20, 0.6, 0.0),
    "caformer_s18": (_LAMB_20, 0.15, 0.0),
    "caformer_s36": (_LAMB_20, 0.3, 0.4),
    "caformer_m36": (_LAMB_20, 0.4, 0.4),
    "caformer_b36": (_LAMB_20, 0.6, 0.5),
}
# The same at 384 pixels: scripts/*/finetune_*_384.sh.
_CONSTANT = OptimizerConfig(
    learning_rate=5e-5,
    learning_rate_batch=1024,
    epochs=30,
    warmup_epochs=0,
    cooldown_epochs=0,
    schedule="constant",
    ema_decay=0.9999,
)
_CONSTANT_LAMB = dataclasses.replace(_CONSTANT, name="lamb", learning_rate=1e-4)
_AT_384 = {
    "convformer_s18": (_CONSTANT, 0.3, 0.4),
    "convformer_s36": (_CONSTANT, 0.5, 0.4),
    "convformer_m36": (_CONSTANT, 0.8, 0.5),
    "convformer_b36": (_CONSTANT, 0.8, 0.5),
    "caformer_s18": (_CONSTANT_LAMB, 0.3, 0.4),
    "caformer_s36": (_CONSTANT_LAMB, 0.5, 0.4),
    "caformer_m36": (_CONSTANT_LAMB, 0.7, 0.4),
    "caformer_b36": (_CONSTANT_LAMB, 0.8, 0.5),
}

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

    Command:  python -m train finetune --data.source folder:PATH

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
    **{f"imagenet-{size}": _imagenet(size, 1024, OptimizerConfig(), rate) for size, rate in _DROP_PATH.items()},
    **{f"imagenet-{variant}": _imagenet(variant, 4096, *settings) for variant, settings in _SECOND_PAPER.items()},
    **{f"imagenet-{variant}_384": _imagenet_384(variant, *settings) for variant, settings in _AT_384.items()},
    "finetune": _FINETUNE,
    "smoke": _SMOKE,
}
