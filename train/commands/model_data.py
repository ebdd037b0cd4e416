"""The data that a model is tried on, prepared as by the model's preprocessing."""

from typing import Any

from poolformer_jax import PoolFormerImageProcessor
from train.data import DataConfig


def data_for_model(
    processor: PoolFormerImageProcessor, source: str, held_out: float | None, **fields: Any
) -> DataConfig:
    """The data `source`, with the size and normalisation of a preprocessing whose results have one size.

    Args:
        processor: the model's preprocessing.
        source: as `DataConfig.source`.
        held_out: as `DataConfig.held_out`; None for the share that the recipes hold out.
        fields: further fields of the config.
    """
    assert processor.output_size is not None, "the callers check it"
    mean, std = processor.normalization.unit_mean_and_std()
    if held_out is None:
        held_out = 0.2 if source == "digits" else 0.1
    return DataConfig(
        source=source,
        held_out=held_out,
        image_size=max(processor.output_size),
        image_mean=tuple(mean),
        image_std=tuple(std),
        **fields,
    )
