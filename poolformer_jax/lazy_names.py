"""Packages that import the names they offer when these are first used, so that importing a package stays cheap."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(package: str, names_by_module: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Returns a package's `__getattr__`.

    Args:
        package: `__name__` of the package.
        names_by_module: for each module of the package, the names in it that the package offers. None of them may be
            the name of a module in the package too.

    Example:
        __getattr__ = lazy_names(__name__, {"source": ["open_model", "OpenedModel"]})
    """
    modules = {name: module for module, names in names_by_module.items() for name in names}

    def import_name(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return import_name
