"""What network a run trains: a fresh one, or one whose weights are there already. The fields of a recipe say which."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import tyro

from poolformer_jax import PoolFormerConfig
from poolformer_jax.fields import check_rules

ComputeType = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True)
class FreshNetwork(PoolFormerConfig):
    """A network with new weights. What follows from the data is no flag: labels, their names, and channels."""

    num_channels: tyro.conf.Suppress[int] = 3
    num_labels: tyro.conf.Suppress[int] = 0
    id2label: tyro.conf.Suppress[Mapping[int, str] | None] = None


@dataclasses.dataclass(frozen=True)
class PretrainedNetwork:
    """Weights to go on from, with a new head for the classes of the data."""

    source: str = "sail/poolformer_s12"
    """What load_pretrained opens: a model on the Hub (sail/poolformer_s12), a model folder, or a weights file."""
    use_ema: bool = False
    """Take the running mean of the weights, where the file has one."""
    keep_head: bool = False
    """Go on with the head as well. Its classes must be those of the data, in their order."""
    drop_path_rate: float = 0.1
    """Probability of dropping the last block's residual branches; it grows linearly from 0 over all blocks."""
    dropout_rate: float = 0.0
    """Dropout after both layers of the MLP."""

    def __post_init__(self) -> None:
        rules = [
            ("source", bool(self.source), "the name of a model, or a path"),
            ("drop_path_rate", 0 <= self.drop_path_rate < 1, "a probability in [0, 1)"),
            ("dropout_rate", 0 <= self.dropout_rate < 1, "a probability in [0, 1)"),
        ]
        check_rules(self, rules)
