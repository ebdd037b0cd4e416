"""The parameter tree of every network as one table: path, shape, when it is present, initial values.

The linen modules, the tables of PyTorch names, the check of a tree, counts and new heads all follow from it;
`parameters` applies it to a config. This module holds data only: `config` imports it to check the names of mixers.

A line is one parameter:

  path      `{s}` is the stage, `{b}` the block in it.
  shape     k patch size, i channels before the stage, c channels of the stage, m hidden channels of its MLP, h and w
            sides of its feature map, n its positions (h * w), l labels; `3c` is three times c, `7` is 7. Outside the
            stages, the stem has the sizes of the first stage, and norm and head have those of the last.
  when      the condition of `parameters.is_present`.
  initial   `convolution` and `convolution bias`: with convolution_init="torch" uniform within 1 / sqrt(fan_in),
            PyTorch's default, else as `normal` and `zeros`; `normal` with standard deviation 0.02; `zeros`; `ones`;
            `layer scale`, the config's `layer_scale_init_value`; `residual scale`, the stage's entry of its
            `residual_scale_init_values`; `random mixing`, columns of positive numbers with sum 1, which are drawn once
            and never trained: these arrays are in the collection `CONSTANTS` of a model's variables, all others in
            `PARAMS`.

Initial values follow the authors: sail-sg/poolformer, models/poolformer.py and models/metaformer.py;
sail-sg/metaformer, metaformer_baselines.py.
"""

import re
from functools import cache
from typing import NamedTuple

NETWORK, STAGE, BLOCK = "", "stages_{s}/", "stages_{s}/blocks_{b}/"
_MIXER = "token_mixer/"
HEAD_DIM = 32  # channels of a head of the attention mixer
PARAMS, CONSTANTS = "params", "constants"
_FROZEN = "random mixing"

_BACKBONE = """
    stem/conv/kernel                       k k i c  always                 convolution
    stem/conv/bias                         c        always                 convolution bias
    stem/norm/scale                        c        stem norm              ones
    stages_{s}/downsample/norm/scale       i        downsample norm        ones
    stages_{s}/downsample/conv/kernel      k k i c  after the first stage  convolution
    stages_{s}/downsample/conv/bias        c        after the first stage  convolution bias
    stages_{s}/position_embedding          h w c    position embedding     zeros
    stages_{s}/blocks_{b}/norm1/scale      c        always                 ones
    stages_{s}/blocks_{b}/norm1/bias       c        norm bias              zeros
"""
# Between the two: the entry of `MIXER_PARAMETERS` for the stage's token mixer.
_AFTER_MIXER = """
    stages_{s}/blocks_{b}/layer_scale_1/scale     c    layer scale     layer scale
    stages_{s}/blocks_{b}/residual_scale_1/scale  c    residual scale  residual scale
    stages_{s}/blocks_{b}/norm2/scale             c    always          ones
    stages_{s}/blocks_{b}/norm2/bias              c    norm bias       zeros
    stages_{s}/blocks_{b}/mlp/fc1/kernel          c m  always          normal
    stages_{s}/blocks_{b}/mlp/fc1/bias            m    mlp bias        zeros
    stages_{s}/blocks_{b}/mlp/act/scale           1    star relu       ones
    stages_{s}/blocks_{b}/mlp/act/bias            1    star relu       zeros
    stages_{s}/blocks_{b}/mlp/fc2/kernel          m c  always          normal
    stages_{s}/blocks_{b}/mlp/fc2/bias            c    mlp bias        zeros
    stages_{s}/blocks_{b}/layer_scale_2/scale     c    layer scale     layer scale
    stages_{s}/blocks_{b}/residual_scale_2/scale  c    residual scale  residual scale
"""
_HEAD = """
    norm/scale                             c        classifier             ones
    norm/bias                              c        classifier             zeros
    head/kernel                            c l      linear head            normal
    head/bias                              l        linear head            zeros
    head/fc1/kernel                        c 4c     mlp head               normal
    head/fc1/bias                          4c       mlp head               zeros
    head/norm/scale                        4c       mlp head               ones
    head/norm/bias                         4c       mlp head               zeros
    head/fc2/kernel                        4c l     mlp head               normal
    head/fc2/bias                          l        mlp head               zeros
"""

# Name, shape and initial values of each parameter below `stages_{s}/blocks_{b}/token_mixer/`, by token mixer, and in a
# fourth column a condition if not every network with the mixer has it. Its keys are the mixers that a config may name:
# to add one from outside, set an entry here and in `token_mixers.TOKEN_MIXERS`.
MIXER_PARAMETERS: dict[str, str] = {
    "pooling": "",
    "identity": "",
    "attention": """
        qkv/kernel   c 3c  normal
        proj/kernel  c c   normal
        proj/bias    c     zeros  attention bias
    """,
    "spatial_fc": """
        fc/kernel    n n   normal
    """,
    "random": """
        random/kernel  n n  random mixing
    """,
    "sep_conv": """
        pwconv1/kernel  c 2c      normal
        act1/scale      1         ones
        act1/bias       1         zeros
        dwconv/kernel   7 7 1 2c  normal
        pwconv2/kernel  2c c      normal
    """,
}


class ParameterRow(NamedTuple):
    """One line of the table."""

    place: str  # the part of the path that holds indices: `NETWORK`, `STAGE` or `BLOCK`
    name: str  # the rest of the path
    shape: tuple[str, ...]  # symbols, one for each dimension
    when: str  # "always", another condition, or the name of the token mixer that it belongs to
    initial: str  # one of the words that the table explains

    @property
    def path(self) -> str:
        """The path with `{s}` and `{b}` for the indices."""
        return self.place + self.name

    @property
    def collection(self) -> str:
        """`PARAMS` if training changes it, else `CONSTANTS`: the collection of the variables that holds it."""
        return CONSTANTS if self.initial == _FROZEN else PARAMS


def columns(table: str) -> tuple[tuple[list[str], ...], ...]:
    """The groups of a table (a blank line between two), their lines split into columns (two spaces or more)."""
    groups = table.strip().split("\n\n")
    return tuple(
        tuple(re.split(r"\s{2,}", line.strip()) for line in group.splitlines() if line.strip()) for group in groups
    )


def backbone_rows() -> tuple[ParameterRow, ...]:
    """The rows of the stem and the stages, with those of every token mixer."""
    mixers = tuple(row for name, table in MIXER_PARAMETERS.items() for row in _mixer_rows(name, table))
    return (*_rows(_BACKBONE), *mixers, *_rows(_AFTER_MIXER))


def head_rows() -> tuple[ParameterRow, ...]:
    """The rows of the final norm and the head."""
    return _rows(_HEAD)


@cache
def _rows(table: str) -> tuple[ParameterRow, ...]:
    return tuple(_row(path, shape, when, initial) for group in columns(table) for path, shape, when, initial in group)


@cache
def _mixer_rows(mixer: str, table: str) -> tuple[ParameterRow, ...]:
    return tuple(
        _row(BLOCK + _MIXER + name, shape, when[0] if when else mixer, initial)
        for group in columns(table)
        for name, shape, initial, *when in group
    )


def _row(path: str, shape: str, when: str, initial: str) -> ParameterRow:
    place = next(place for place in (BLOCK, STAGE, NETWORK) if path.startswith(place))
    return ParameterRow(place, path.removeprefix(place), tuple(shape.split()), when, initial)
