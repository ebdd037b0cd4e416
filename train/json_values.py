"""Typed config dataclasses from JSON and back; the fields' annotations are the schema."""

import dataclasses
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from poolformer_jax import PoolFormerConfig
from poolformer_jax.errors import InputError
from poolformer_jax.fields import INTEGER, NUMBER
from poolformer_jax.messages import first_few, short_repr


def from_json(kind: Any, value: Any, name: str) -> Any:
    """The value of the field `name`, of the type `kind`, from its form in JSON."""
    options = get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_json(kind, value, name)
    if get_origin(kind) in (Union, types.UnionType):
        return _union_from_json(options, value, name)
    if get_origin(kind) is tuple and isinstance(value, list):
        repeated = options[1:] == (...,)
        if repeated or len(value) == len(options):
            kinds = options[:1] * len(value) if repeated else options
            return tuple(from_json(one, item, name) for one, item in zip(kinds, value))
    if get_origin(kind) is Literal and value in options:
        return value
    if kind is float and NUMBER.accepts(value):
        return float(value)
    if isinstance(value, str) and "\0" in value:
        raise InputError(f"{name}={short_repr(value)}. Expected a text without a null character.")
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is int and INTEGER.accepts(value):
        return value
    if kind in (bool, str) and type(value) is kind:
        return value
    raise InputError(f"{name}={short_repr(value)}. Expected {kind.__name__ if isinstance(kind, type) else kind}.")


def _dataclass_from_json(kind: Any, value: Any, name: str) -> Any:
    prefix = f"{name}." if name else ""
    fields = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(value, Mapping):
        raise InputError(f"{name}={short_repr(value)}. Expected an object with the fields of {kind.__name__}.")
    if unknown := [prefix + one for one in value if one not in fields]:
        raise InputError(f"It has fields that do not exist: {first_few(unknown)}. Expected it without them.")
    if issubclass(kind, PoolFormerConfig):  # checks and converts its fields itself
        return kind(**value)
    hints = get_type_hints(kind)
    try:
        return kind(**{one: from_json(hints[one], item, prefix + one) for one, item in value.items()})
    except TypeError as error:
        raise InputError(f"{name or 'the recipe'} is not complete: {error}") from error


def _union_from_json(kinds: Sequence[Any], value: Any, name: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    if isinstance(value, Mapping):  # the network
        named = {kind.__name__: kind for kind in kinds}
        if value.get("kind") not in named:
            raise InputError(f"{name}.kind={short_repr(value.get('kind'))}. Expected one of: {', '.join(named)}.")
        rest = {one: item for one, item in value.items() if one != "kind"}
        return from_json(named[value["kind"]], rest, name)
    (kind,) = [one for one in kinds if one is not types.NoneType][:1]
    return from_json(kind, value, name)


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """The values after a round trip through JSON."""
    return json.loads(json.dumps(values, default=lambda value: dict(value) if hasattr(value, "items") else str(value)))
