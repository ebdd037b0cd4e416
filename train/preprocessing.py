"""Compares the preprocessing of pretrained weights with that of a run's flags."""

import logging
from collections.abc import Sequence

import numpy as np
from PIL import Image

from poolformer_jax import PoolFormerImageProcessor
from poolformer_jax.images import share_of_edge
from poolformer_jax.weights import OpenedModel
from train.data import DataConfig

_LOG = logging.getLogger(__name__)


def warn_of_other_preprocessing(opened: OpenedModel, data: DataConfig) -> None:
    """Warns if the weights come with another preprocessing: the run would train, but less well."""
    source = opened.files.source
    try:
        theirs = opened.saved_image_processor
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # the run does not need it
        _LOG.warning("The preprocessing of %s cannot be read and compared with that of this run: %s", source, error)
        return
    if theirs is not None and (different := _flags_of_other_preprocessing(theirs, data)):
        _LOG.warning(
            "The preprocessing of %s differs from that of this run. As flags:\n  %s\nThe run ignores it and saves "
            "the preprocessing of its flags. Expected these flags, unless you want the difference.",
            source,
            "\n  ".join(different),
        )


def _flags_of_other_preprocessing(theirs: PoolFormerImageProcessor, data: DataConfig) -> list[str]:
    """The flags with which a run would prepare images as `theirs` does, except for their size."""
    mean, std = theirs.normalization.unit_mean_and_std()
    flags = []
    for name, wanted, own in (("mean", mean, data.image_mean), ("std", std, data.image_std)):
        if len(wanted) != len(own) or not np.allclose(wanted, own, rtol=0, atol=1e-6):
            flags.append(f"--data.image-{name} {_words(wanted)} (this run: {_words(own)})")
    if theirs.do_resize:
        if (share := _other_crop(theirs, data)) is not None:
            flags.append(f"--data.crop-pct {share} (this run: {data.crop_pct})")
        if (name := Image.Resampling(theirs.resample).name.lower()) != data.evaluation_interpolation:
            known = "" if name in ("bilinear", "bicubic") else ", and no flag has theirs"
            flags.append(f"--data.evaluation-interpolation {name} (this run: {data.evaluation_interpolation}{known})")
    return flags


def _other_crop(theirs: PoolFormerImageProcessor, data: DataConfig) -> float | None:
    """The crop_pct of `theirs`; None if it crops the same pixels as the run, or has no crop_pct.

    Computed from pixels, because a preprocessing may give the resized edge instead.
    """
    side, edge = theirs.crop_size["height"], theirs.shorter_edge
    if not theirs.do_center_crop or edge is None or edge < side or int(side / (data.crop_pct or 1)) == edge:
        return None
    return share_of_edge(theirs, side, edge)


def _words(values: Sequence[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)
