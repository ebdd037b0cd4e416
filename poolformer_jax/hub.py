"""Files of a repository on the Hugging Face Hub, through its cache. No other module of this package uses the Hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from poolformer_jax.errors import MissingDependencyError, MissingFileError

# huggingface_hub's rule for names, with an owner. A missing path is recognised without huggingface_hub.
_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\b[\w.-]+\b/\b[\w.-]{1,96}\b")
WEIGHTS_ENDINGS = (".safetensors", ".pth.tar", ".pth", ".bin", ".pt")


class NotInCache(MissingFileError):
    """A file that is not in the cache and may be on the Hub, which was not asked or cannot be reached."""


class Repository:
    """A repository on the Hub.

    Args:
        name: such as "sail/poolformer_s12".
        files: the names that `find` may be called with.
        revision: branch, tag or commit.
        cache_dir: the Hub's cache; by default huggingface_hub's (HF_HOME).
        local_files_only: use the cache without asking the Hub, as with HF_HUB_OFFLINE=1.
        token: for private models; by default the one stored by `hf auth login`.

    Raises:
        MissingFileError: if this is not the name of a repository.
        MissingDependencyError: if huggingface_hub is not installed.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> None:
        # A name with such an ending is meant as a file, which does not exist.
        if not _ID.fullmatch(name) or name.endswith((*WEIGHTS_ENDINGS, ".json")):
            raise MissingFileError(
                f"There is no model at {name}. Expected a model folder, a file in it, or a name on the Hugging Face "
                "Hub such as 'sail/poolformer_s12'."
            )
        try:
            import huggingface_hub  # noqa: F401
        except ImportError:
            raise MissingDependencyError(
                f"{name!r} is not a file or folder here, and the Hugging Face Hub needs huggingface_hub. Install it "
                "with: pip install 'poolformer-jax[hub]'"
            ) from None
        self.name, self.files = name, files
        self._cache: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        self._options: dict[str, Any] = {**self._cache, "local_files_only": local_files_only, "token": token}

    def find(self, *files: str) -> Path | None:
        """Downloads the first of these files that the repository has; offline, finds the first one in the cache.

        Returns:
            Its path in the cache; None if the repository is known to have none of them.

        Raises:
            MissingFileError: if there is no such repository or revision.
            NotInCache: if the cache has none of them and the Hub cannot be asked.
        """
        from huggingface_hub import errors, hf_hub_download

        unknown = None
        for file in files:
            try:
                return Path(str(hf_hub_download(self.name, file, **self._options)))
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
                wrong_revision = isinstance(error, errors.RevisionNotFoundError)
                missing = f"revision {self._options['revision']!r} of {self.name}" if wrong_revision else self.name
                raise MissingFileError(
                    f"There is no {missing} on the Hugging Face Hub, and no file or folder of that name here. Expected "
                    "a name such as 'sail/poolformer_s12'; a private model needs token=..."
                ) from error
            except errors.LocalEntryNotFoundError as error:
                if self._cached(file) is None:
                    unknown = error
            except errors.EntryNotFoundError:
                pass
        if unknown is None:
            return None
        if any(isinstance(self._cached(file), str) for file in self.files):
            problem = f"The Hub's cache of {self.name} has no {' or '.join(files)}"
        else:
            problem = f"{self.name!r} is not a file or folder here, and not in the Hub's cache"
        raise NotInCache(
            f"{problem}. The Hub was not asked or cannot be reached. Connect, without local_files_only and "
            "HF_HUB_OFFLINE, or pass the cache_dir=... that has it."
        ) from unknown

    def _cached(self, file: str) -> Any:
        """The path in the cache; None if never requested; another object if the repository is known to lack it."""
        from huggingface_hub import try_to_load_from_cache

        return try_to_load_from_cache(self.name, file, **self._cache)
