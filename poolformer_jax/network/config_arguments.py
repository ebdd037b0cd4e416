"""How `MetaFormerConfig` takes the arguments and the config.json of transformers' PoolFormerConfig."""

import dataclasses
import difflib
import functools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from poolformer_jax.errors import InputError
from poolformer_jax.fields import INTEGER
from poolformer_jax.messages import first_few, printable, short_repr
from poolformer_jax.network.config_fields import as_index

_Class = TypeVar("_Class")

# Arguments of transformers' PoolFormerConfig that are accepted and have no effect. There they have none on a PoolFormer
# either, but for three: `dtype` is an argument of the models here, random parameters are drawn as the authors draw them
# (`initializer_range`), and `architectures` is checked in a config.json only.
_WITHOUT_EFFECT = {
    *("_commit_hash", "_name_or_path", "architectures", "attn_implementation", "chunk_size_feed_forward", "dtype"),
    *("initializer_range", "is_encoder_decoder", "model_type", "name_or_path", "output_attentions", "patch_size"),
    *("stride", "torch_dtype", "transformers_version", "use_cache"),
}


def takes_arguments_of_transformers(cls: type[_Class]) -> type[_Class]:
    """Lets the constructor take arguments of transformers that are not fields: see `_fields_of`."""
    make = cls.__init__

    @functools.wraps(make)
    def __init__(self: Any, *values: Any, **arguments: Any) -> None:
        make(self, *values, **_fields_of(arguments, cls))

    setattr(cls, "__init__", __init__)  # noqa: B010 - a type checker keeps the dataclass's own signature
    return cls


def arguments_of(cls: Any) -> set[str]:
    """The names of the constructor's arguments."""
    return {*_WITHOUT_EFFECT, "label2id", "num_encoder_blocks", *(field.name for field in dataclasses.fields(cls))}


def _fields_of(arguments: Mapping[str, Any], cls: Any) -> dict[str, Any]:
    """The fields for arguments of the constructor, some of which only transformers has."""
    _check_names(arguments, cls)
    fields = {name: value for name, value in arguments.items() if name not in _WITHOUT_EFFECT}
    stages, label2id = fields.pop("num_encoder_blocks", None), fields.pop("label2id", None)
    depths = fields.get("depths", cls.depths)
    if INTEGER.accepts(stages):
        if isinstance(depths, Sequence) and len(depths) != stages:
            raise InputError(f"num_encoder_blocks={stages}: expected one for each of depths={short_repr(depths)}.")
        # With fewer stages, transformers still writes its four default values.
        for name in ("patch_sizes", "strides", "padding"):
            if isinstance(entries := fields.get(name, getattr(cls, name)), Sequence):
                fields[name] = entries[:stages]
    if isinstance(depths, Sequence):  # transformers does not have these two; their defaults follow the stages
        defaults = {"token_mixers": ("pooling",) * len(depths), "position_embeddings": (False,) * len(depths)}
        fields = {**defaults, **fields}
    if fields.get("id2label") is None and isinstance(label2id, Mapping) and label2id:
        if not all(isinstance(index, str | numbers.Integral) for index in label2id.values()):
            raise InputError(f"label2id={short_repr(label2id)}: expected the index of each name.")
        fields["id2label"] = {as_index(index): label for label, index in label2id.items()}
    if isinstance(names := fields.get("id2label"), Mapping | Sequence):
        fields.setdefault("num_labels", len(names))
    return fields


def _check_names(arguments: Mapping[str, Any], cls: Any) -> None:
    if unknown := sorted(map(printable, arguments.keys() - arguments_of(cls))):
        known = [field.name for field in dataclasses.fields(cls)]
        near = [close for name in unknown[:5] for close in difflib.get_close_matches(name, known, n=1)]
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise InputError(f"{cls.__name__} has no field {first_few(unknown)}.{hint} Its fields: {', '.join(known)}.")


def check_architecture(data: Mapping[str, Any]) -> None:
    """Raises InputError if a config.json is not of a PoolFormer or MetaFormer."""
    if "architecture" in data:
        raise InputError(
            f"This config.json is timm's, for {short_repr(data['architecture'])}, and does not describe the layers. "
            "Expected model_type 'poolformer' or 'metaformer'; load_pretrained reads timm's config together with its "
            "weights."
        )
    if (model_type := data.get("model_type", "poolformer")) not in ("poolformer", "metaformer"):
        raise InputError(
            f"This config.json describes a {short_repr(model_type)} model. Expected model_type 'poolformer' or "
            "'metaformer'."
        )
    classes = data.get("architectures") or ()
    known = ("PoolFormer", "MetaFormer")
    if not isinstance(classes, Sequence) or not all(isinstance(c, str) and c.startswith(known) for c in classes):
        raise InputError(
            f"This config.json has architectures={short_repr(classes)}. Expected those of PoolFormer or MetaFormer, "
            "such as ['PoolFormerForImageClassification']."
        )
