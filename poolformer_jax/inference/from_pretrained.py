"""`from_pretrained` of what is made from a network, its parameters and its preprocessing."""

import os
from pathlib import Path
from typing import Any, NoReturn, Self

import jax
from jax.experimental.compilation_cache import compilation_cache

from poolformer_jax.errors import InputError
from poolformer_jax.hub import HubOptions
from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.network import PoolFormerConfig, describe_network
from poolformer_jax.weights import build_model, open_model

# The options of `from_pretrained` that are passed to `open_model`.
_OPEN_OPTIONS = (*HubOptions.__annotations__, "use_ema", "config", "variant", "ignore")


def not_picklable(self: object) -> NoReturn:
    """The `__reduce__` of what holds compiled programs, which cannot move to another process."""
    raise InputError(
        f"{type(self).__name__} cannot be pickled. Make one in each process: docs/inference.md, Several processes."
    )


class FromPretrained:
    """The base of classes whose constructors take a config, variables, an image processor, and options."""

    config: PoolFormerConfig
    __reduce__ = not_picklable

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe_network(self.config)})"

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        image_processor: PoolFormerImageProcessor | None = None,
        compilation_cache_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        """The same with published or trained weights.

        Args:
            source: a name on the Hub ("sail/poolformer_s12"), a model folder, or a weights file.
            image_processor: the preprocessing; by default the one saved with the weights, or else that of the
                published variant of this architecture.
            compilation_cache_dir: folder in which compiled programs are kept for the next process. It becomes jax's
                compilation cache for the whole process.
            options: the constructor's, and revision, cache_dir, local_files_only, token, use_ema, config, variant and
                ignore as in `load_pretrained`.

        Raises:
            ValueError: if the preprocessing is unknown.
        """
        if compilation_cache_dir is not None:
            keep_compiled_programs(compilation_cache_dir)
        opened = open_model(source, **{name: options.pop(name) for name in _OPEN_OPTIONS if name in options})
        model, variables = build_model(opened)
        return cls(model.config, variables, image_processor or opened.image_processor, **options)  # type: ignore[call-arg]


def keep_compiled_programs(folder: str | os.PathLike[str]) -> None:
    """Makes `folder` jax's persistent compilation cache, for programs of any size and compile time."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "jax_compilation_cache_dir": os.fspath(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax would keep using the folder of the first program
