"""The names of every parameter in the PyTorch implementations of MetaFormers. No other module lists them.

Each table has a row for every path of the parameter tree (`network.parameter_table`): its PyTorch name, and the
transform between the two arrays. Rows have the order in which PyTorch registers the parameters, so that a table can be
read beside its source:

  sail  first paper: sail-sg/poolformer, models/poolformer.py (`PoolFormer`, `PoolFormerBlock`) and, for position
        embeddings, attention and spatial fc, models/metaformer.py (`MetaFormer`, `AddPositionEmb`, `Attention`,
        `SpatialFc`); second paper: sail-sg/metaformer, metaformer_baselines.py (`MetaFormer`)
  hf    transformers, models/poolformer/modeling_poolformer.py; the first paper only
  timm  pytorch-image-models, timm/models/metaformer.py (`MetaFormer`); both papers. timm has no IdentityFormer and no
        RandFormer: their names are those that its weight filter gives to the authors' arrays
  jax   this package: the name is the path

A row stands for every stage `{s}` and block `{b}`. The authors' first code has one list, `network`, with the
downsampling, position embedding and blocks of all stages: `{down}`, `{pos}` and `{at}` are their indices in it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from poolformer_jax.errors import InputError
from poolformer_jax.messages import first_few
from poolformer_jax.network import (
    Parameter,
    ParameterRow,
    PoolFormerConfig,
    backbone_rows,
    columns,
    head_rows,
    parameters_of_rows,
)

_SAIL = """
    stem/conv/kernel                                 patch_embed.proj.weight                   conv
    stem/conv/bias                                   patch_embed.proj.bias                     same

    stages_{s}/downsample/conv/kernel                network.{down}.proj.weight                conv
    stages_{s}/downsample/conv/bias                  network.{down}.proj.bias                  same
    stages_{s}/position_embedding                    network.{pos}.pos_embed                   position
    stages_{s}/blocks_{b}/layer_scale_1/scale        network.{at}.{b}.layer_scale_1            same
    stages_{s}/blocks_{b}/layer_scale_2/scale        network.{at}.{b}.layer_scale_2            same
    stages_{s}/blocks_{b}/norm1/scale                network.{at}.{b}.norm1.weight             same
    stages_{s}/blocks_{b}/norm1/bias                 network.{at}.{b}.norm1.bias               same
    stages_{s}/blocks_{b}/token_mixer/qkv/kernel     network.{at}.{b}.token_mixer.qkv.weight   linear
    stages_{s}/blocks_{b}/token_mixer/proj/kernel    network.{at}.{b}.token_mixer.proj.weight  linear
    stages_{s}/blocks_{b}/token_mixer/proj/bias      network.{at}.{b}.token_mixer.proj.bias    same
    stages_{s}/blocks_{b}/token_mixer/fc/kernel      network.{at}.{b}.token_mixer.fc.weight    linear
    stages_{s}/blocks_{b}/norm2/scale                network.{at}.{b}.norm2.weight             same
    stages_{s}/blocks_{b}/norm2/bias                 network.{at}.{b}.norm2.bias               same
    stages_{s}/blocks_{b}/mlp/fc1/kernel             network.{at}.{b}.mlp.fc1.weight           pointwise
    stages_{s}/blocks_{b}/mlp/fc1/bias               network.{at}.{b}.mlp.fc1.bias             same
    stages_{s}/blocks_{b}/mlp/fc2/kernel             network.{at}.{b}.mlp.fc2.weight           pointwise
    stages_{s}/blocks_{b}/mlp/fc2/bias               network.{at}.{b}.mlp.fc2.bias             same

    norm/scale                                       norm.weight                               same
    norm/bias                                        norm.bias                                 same
    head/kernel                                      head.weight                               linear
    head/bias                                        head.bias                                 same
"""

_SAIL_SECOND_PAPER = """
    stem/conv/kernel                                    downsample_layers.0.conv.weight              conv
    stem/conv/bias                                      downsample_layers.0.conv.bias                same
    stem/norm/scale                                     downsample_layers.0.post_norm.weight         same

    stages_{s}/downsample/norm/scale                    downsample_layers.{s}.pre_norm.weight        same
    stages_{s}/downsample/conv/kernel                   downsample_layers.{s}.conv.weight            conv
    stages_{s}/downsample/conv/bias                     downsample_layers.{s}.conv.bias              same

    stages_{s}/blocks_{b}/norm1/scale                   stages.{s}.{b}.norm1.weight                  same
    stages_{s}/blocks_{b}/token_mixer/pwconv1/kernel    stages.{s}.{b}.token_mixer.pwconv1.weight    linear
    stages_{s}/blocks_{b}/token_mixer/act1/scale        stages.{s}.{b}.token_mixer.act1.scale        same
    stages_{s}/blocks_{b}/token_mixer/act1/bias         stages.{s}.{b}.token_mixer.act1.bias         same
    stages_{s}/blocks_{b}/token_mixer/dwconv/kernel     stages.{s}.{b}.token_mixer.dwconv.weight     conv
    stages_{s}/blocks_{b}/token_mixer/pwconv2/kernel    stages.{s}.{b}.token_mixer.pwconv2.weight    linear
    stages_{s}/blocks_{b}/token_mixer/qkv/kernel        stages.{s}.{b}.token_mixer.qkv.weight        linear
    stages_{s}/blocks_{b}/token_mixer/proj/kernel       stages.{s}.{b}.token_mixer.proj.weight       linear
    stages_{s}/blocks_{b}/token_mixer/random/kernel     stages.{s}.{b}.token_mixer.random_matrix     linear
    stages_{s}/blocks_{b}/residual_scale_1/scale        stages.{s}.{b}.res_scale1.scale              same
    stages_{s}/blocks_{b}/norm2/scale                   stages.{s}.{b}.norm2.weight                  same
    stages_{s}/blocks_{b}/mlp/fc1/kernel                stages.{s}.{b}.mlp.fc1.weight                linear
    stages_{s}/blocks_{b}/mlp/act/scale                 stages.{s}.{b}.mlp.act.scale                 same
    stages_{s}/blocks_{b}/mlp/act/bias                  stages.{s}.{b}.mlp.act.bias                  same
    stages_{s}/blocks_{b}/mlp/fc2/kernel                stages.{s}.{b}.mlp.fc2.weight                linear
    stages_{s}/blocks_{b}/residual_scale_2/scale        stages.{s}.{b}.res_scale2.scale              same

    norm/scale                                          norm.weight                                  same
    norm/bias                                           norm.bias                                    same
    head/kernel                                         head.weight                                  linear
    head/bias                                           head.bias                                    same
    head/fc1/kernel                                     head.fc1.weight                              linear
    head/fc1/bias                                       head.fc1.bias                                same
    head/norm/scale                                     head.norm.weight                             same
    head/norm/bias                                      head.norm.bias                               same
    head/fc2/kernel                                     head.fc2.weight                              linear
    head/fc2/bias                                       head.fc2.bias                                same
"""

_HF = """
    stem/conv/kernel                             poolformer.encoder.patch_embeddings.0.projection.weight    conv
    stem/conv/bias                               poolformer.encoder.patch_embeddings.0.projection.bias      same

    stages_{s}/downsample/conv/kernel            poolformer.encoder.patch_embeddings.{s}.projection.weight  conv
    stages_{s}/downsample/conv/bias              poolformer.encoder.patch_embeddings.{s}.projection.bias    same

    stages_{s}/blocks_{b}/layer_scale_1/scale    poolformer.encoder.block.{s}.{b}.layer_scale_1             same
    stages_{s}/blocks_{b}/layer_scale_2/scale    poolformer.encoder.block.{s}.{b}.layer_scale_2             same
    stages_{s}/blocks_{b}/mlp/fc1/kernel         poolformer.encoder.block.{s}.{b}.output.conv1.weight       pointwise
    stages_{s}/blocks_{b}/mlp/fc1/bias           poolformer.encoder.block.{s}.{b}.output.conv1.bias         same
    stages_{s}/blocks_{b}/mlp/fc2/kernel         poolformer.encoder.block.{s}.{b}.output.conv2.weight       pointwise
    stages_{s}/blocks_{b}/mlp/fc2/bias           poolformer.encoder.block.{s}.{b}.output.conv2.bias         same
    stages_{s}/blocks_{b}/norm1/scale            poolformer.encoder.block.{s}.{b}.before_norm.weight        same
    stages_{s}/blocks_{b}/norm1/bias             poolformer.encoder.block.{s}.{b}.before_norm.bias          same
    stages_{s}/blocks_{b}/norm2/scale            poolformer.encoder.block.{s}.{b}.after_norm.weight         same
    stages_{s}/blocks_{b}/norm2/bias             poolformer.encoder.block.{s}.{b}.after_norm.bias           same

    norm/scale                                   norm.weight                                                same
    norm/bias                                    norm.bias                                                  same
    head/kernel                                  classifier.weight                                          linear
    head/bias                                    classifier.bias                                            same
"""

_TIMM = """
    stem/conv/kernel                                  stem.conv.weight                                    conv
    stem/conv/bias                                    stem.conv.bias                                      same
    stem/norm/scale                                   stem.norm.weight                                    same

    stages_{s}/downsample/norm/scale                  stages.{s}.downsample.norm.weight                   same
    stages_{s}/downsample/conv/kernel                 stages.{s}.downsample.conv.weight                   conv
    stages_{s}/downsample/conv/bias                   stages.{s}.downsample.conv.bias                     same
    stages_{s}/blocks_{b}/norm1/scale                 stages.{s}.blocks.{b}.norm1.weight                  same
    stages_{s}/blocks_{b}/norm1/bias                  stages.{s}.blocks.{b}.norm1.bias                    same
    stages_{s}/blocks_{b}/token_mixer/pwconv1/kernel  stages.{s}.blocks.{b}.token_mixer.pwconv1.weight    pointwise
    stages_{s}/blocks_{b}/token_mixer/act1/scale      stages.{s}.blocks.{b}.token_mixer.act1.scale        same
    stages_{s}/blocks_{b}/token_mixer/act1/bias       stages.{s}.blocks.{b}.token_mixer.act1.bias         same
    stages_{s}/blocks_{b}/token_mixer/dwconv/kernel   stages.{s}.blocks.{b}.token_mixer.dwconv.weight     conv
    stages_{s}/blocks_{b}/token_mixer/pwconv2/kernel  stages.{s}.blocks.{b}.token_mixer.pwconv2.weight    pointwise
    stages_{s}/blocks_{b}/token_mixer/qkv/kernel      stages.{s}.blocks.{b}.token_mixer.qkv.weight        linear
    stages_{s}/blocks_{b}/token_mixer/proj/kernel     stages.{s}.blocks.{b}.token_mixer.proj.weight       linear
    stages_{s}/blocks_{b}/token_mixer/random/kernel   stages.{s}.blocks.{b}.token_mixer.random_matrix     linear
    stages_{s}/blocks_{b}/layer_scale_1/scale         stages.{s}.blocks.{b}.layer_scale1.scale            same
    stages_{s}/blocks_{b}/residual_scale_1/scale      stages.{s}.blocks.{b}.res_scale1.scale              same
    stages_{s}/blocks_{b}/norm2/scale                 stages.{s}.blocks.{b}.norm2.weight                  same
    stages_{s}/blocks_{b}/norm2/bias                  stages.{s}.blocks.{b}.norm2.bias                    same
    stages_{s}/blocks_{b}/mlp/fc1/kernel              stages.{s}.blocks.{b}.mlp.fc1.weight                mlp
    stages_{s}/blocks_{b}/mlp/fc1/bias                stages.{s}.blocks.{b}.mlp.fc1.bias                  same
    stages_{s}/blocks_{b}/mlp/act/scale               stages.{s}.blocks.{b}.mlp.act.scale                 same
    stages_{s}/blocks_{b}/mlp/act/bias                stages.{s}.blocks.{b}.mlp.act.bias                  same
    stages_{s}/blocks_{b}/mlp/fc2/kernel              stages.{s}.blocks.{b}.mlp.fc2.weight                mlp
    stages_{s}/blocks_{b}/mlp/fc2/bias                stages.{s}.blocks.{b}.mlp.fc2.bias                  same
    stages_{s}/blocks_{b}/layer_scale_2/scale         stages.{s}.blocks.{b}.layer_scale2.scale            same
    stages_{s}/blocks_{b}/residual_scale_2/scale      stages.{s}.blocks.{b}.res_scale2.scale              same

    norm/scale                                        head.norm.weight                                    same
    norm/bias                                         head.norm.bias                                      same
    head/kernel                                       head.fc.weight                                      linear
    head/bias                                         head.fc.bias                                        same
    head/fc1/kernel                                   head.fc.fc1.weight                                  linear
    head/fc1/bias                                     head.fc.fc1.bias                                    same
    head/norm/scale                                   head.fc.norm.weight                                 same
    head/norm/bias                                    head.fc.norm.bias                                   same
    head/fc2/kernel                                   head.fc.fc2.weight                                  linear
    head/fc2/bias                                     head.fc.fc2.bias                                    same
"""


@dataclass(frozen=True)
class Transform:
    """Converts one kind of array between a layout and the parameter tree. Results are views of the same values."""

    description: str
    to_tree: Callable[[np.ndarray], np.ndarray]
    to_layout: Callable[[np.ndarray], np.ndarray]


TRANSFORMS: Mapping[str, Transform] = {
    "same": Transform("as it is", lambda x: x, lambda x: x),
    "conv": Transform("OIHW <-> HWIO", lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),
    "pointwise": Transform("OI11 <-> IO", lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),
    "linear": Transform("OI <-> IO", lambda x: x.T, lambda x: x.T),
    "position": Transform("1CHW <-> HWC", lambda x: x[0].transpose(1, 2, 0), lambda x: x.transpose(2, 0, 1)[None]),
}
# timm writes the MLP of stages with attention as linear layers, and that of others as 1 x 1 convolutions: `linear` or
# `pointwise`.
MLP = "mlp"


class Row(NamedTuple):
    """One row of a layout: a path of the tree, its name in the layout, and the key of the transform, or `MLP`."""

    path: str
    name: str
    transform: str


class Leaf(NamedTuple):
    """One parameter of one network: a row with its indices filled in, and its shapes in the tree and in the layout."""

    path: str
    name: str
    transform: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The names in one library."""

    name: str  # "sail", "hf", "timm" or "jax"
    table: str | None  # its rows as text; None for the paths of the tree
    fixed: Mapping[str, Any]  # fields of the config that the library's code fixes and no array shows
    # The same for networks of the second paper, if the library has other code for them.
    second_paper: "Layout | None" = None

    @property
    def groups(self) -> tuple[tuple[Row, ...], ...]:
        """The rows. All stages of a group come before the next group."""
        if self.table is None:
            return tuple(
                tuple(Row(row.path, row.path, "same") for row in rows()) for rows in (backbone_rows, head_rows)
            )
        return tuple(tuple(Row(*line) for line in group) for group in columns(self.table))

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows, in the order of the tables; a row that both papers' tables have once."""
        own = [row for group in self.groups for row in group]
        return tuple(dict.fromkeys([*own, *(self.second_paper.rows if self.second_paper else ())]))

    def for_network(self, config: PoolFormerConfig) -> "Layout":
        """The names that the library's code for this network has."""
        return self.second_paper if self.second_paper and config.downsample_norm else self

    def fixed_fields(self, config: PoolFormerConfig) -> dict[str, Any]:
        """What the library's code fixes about this network and no array shows."""
        fixed = self.for_network(config).fixed
        return {name: value for name, value in fixed.items() if config.head == "mlp" or name != "head_norm_epsilon"}


LAYOUTS: Mapping[str, Layout] = {
    "sail": Layout(
        "sail",
        _SAIL,
        {"head_order": "norm_pool"},
        Layout("sail", _SAIL_SECOND_PAPER, {"head_order": "pool_norm", "head_norm_epsilon": 1e-5}),
    ),
    "hf": Layout("hf", _HF, {"head_order": "norm_pool"}),
    "timm": Layout("timm", _TIMM, {"head_order": "pool_norm", "head_norm_epsilon": 1e-6}),
    "jax": Layout("jax", None, {}),
}


def parameter_rows() -> dict[str, ParameterRow]:
    """The rows of the network's table by path."""
    return {row.path: row for row in (*backbone_rows(), *head_rows())}


def leaves(config: PoolFormerConfig, layout: str = "jax", *, classifier: bool = True) -> tuple[Leaf, ...]:
    """Every parameter of the network with its name in `layout`, in the order of its state dict.

    Raises InputError if the layout does not exist, or has no name for some of the network's parameters.
    """
    if layout not in LAYOUTS:
        raise InputError(f"There is no layout {layout!r}. Expected one of: {', '.join(LAYOUTS)}.")
    found = _named_leaves(config, LAYOUTS[layout], classifier)
    if layout != "jax":
        named = {leaf.path for leaf in found}
        if nameless := [leaf.path for leaf in leaves(config, classifier=classifier) if leaf.path not in named]:
            wanted = len(found) + len(nameless)
            takers = [name for name in LAYOUTS if len(_named_leaves(config, LAYOUTS[name], classifier)) == wanted]
            raise InputError(
                f"The layout {layout!r} has no name for {first_few(nameless, 3)}: its model has no such part. Expected "
                f"a layout that has: {', '.join(map(repr, takers))}."
            )
    return tuple(found)


def _named_leaves(config: PoolFormerConfig, layout: Layout, classifier: bool) -> list[Leaf]:
    """The parameters that the layout has names for, in its order."""
    own_rows = parameter_rows()
    found = []
    for group in layout.for_network(config).groups:
        rows = {row.path: row for row in group}
        own = [own_rows[path] for path in rows]
        found += [
            _leaf(config, rows[parameter.row.path], parameter)
            for parameter in parameters_of_rows(config, own, classifier=classifier)
        ]
    return found


def _leaf(config: PoolFormerConfig, row: Row, parameter: Parameter) -> Leaf:
    indices = {"s": parameter.stage, "b": parameter.block, **network_places(config)[parameter.stage]}
    transform = row.transform
    if transform == MLP:
        transform = "linear" if config.token_mixers[parameter.stage] == "attention" else "pointwise"
    # An array of this shape without its memory.
    stored_shape = TRANSFORMS[transform].to_layout(np.broadcast_to(np.int8(0), parameter.shape)).shape
    return Leaf(parameter.path, row.name.format(**indices), transform, parameter.shape, stored_shape)


def network_places(config: PoolFormerConfig) -> list[dict[str, int]]:
    """The indices of each stage's downsampling, position embedding and blocks in sail's list `network`.

    For each stage `MetaFormer.__init__` appends the position embedding if the stage has one, its blocks, and the
    downsampling into the next stage.
    """
    places: list[dict[str, int]] = []
    free = 0
    for stage, embedded in enumerate(config.position_embeddings):
        place = {"down": free, "pos": free + (stage > 0), "at": free + (stage > 0) + embedded}
        places.append(place)
        free = place["at"] + 1
    return places
