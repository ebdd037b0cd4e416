"""Files of a repository on the Hugging Face Hub, through its cache. Nothing else here asks the Hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from poolformer_jax.errors import MissingDependencyError, MissingFileError

# As huggingface_hub checks it, with an owner; it need not be installed to tell a path from a name.
_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\b[\w.-]+\b/\b[\w.-]{1,96}\b")
WEIGHTS_ENDINGS = (".safetensors", ".pth.tar", ".pth", ".bin", ".pt")


class NotInCache(MissingFileError):
    """A file that the cache does not hold, when the Hub could not be asked whether the repository has it."""


class Repository:
    """A repository on the Hub.

    Args:
        name: such as "sail/poolformer_s12".
        files: what may be asked for.
        revision: branch, tag or commit.
        cache_dir: the Hub's cache; by default where huggingface_hub keeps it (HF_HOME).
        local_files_only: whether to take what the cache has and ask nobody. HF_HUB_OFFLINE=1 does so too.
        token: for private models; by default the one that `hf auth login` stored.

    Raises:
        FileNotFoundError: if this is no name of a repository.
        ModuleNotFoundError: if huggingface_hub is not installed.
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
        # Whoever writes such an ending means a file that is not there, and no repository.
        if not _ID.fullmatch(name) or name.endswith((*WEIGHTS_ENDINGS, ".json")):
            raise MissingFileError(
                f"There is no model at {name}. Expected a model folder, a file in it, or a name on the Hugging Face "
                "Hub such as 'sail/poolformer_s12'."
            )
        try:
            import huggingface_hub  # noqa: F401
        except ImportError:
            raise MissingDependencyError(
                f"{name!r} is no file or folder here, and to look for it on the Hugging Face Hub needs "
                "huggingface_hub. Install it with: pip install 'poolformer-jax[hub]'"
            ) from None
        self.name, self.files = name, files
        self._of_cache: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        self._options: dict[str, Any] = {**self._of_cache, "local_files_only": local_files_only, "token": token}

    def find(self, *files: str) -> Path | None:
        """Where the first of these files is in the cache, downloaded if need be; offline, the first that is there.

        Returns:
            None if the repository is known to have none of them.

        Raises:
            FileNotFoundError: if there is no such repository or revision.
            NotInCache: if the cache has none of them, and nobody can tell what the repository has.
        """
        from huggingface_hub import errors, hf_hub_download

        unknown = None
        for file in files:
            try:
                return Path(str(hf_hub_download(self.name, file, **self._options)))
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
                named = isinstance(error, errors.RevisionNotFoundError)
                what = f"revision {self._options['revision']!r} of {self.name}" if named else self.name
                raise MissingFileError(
                    f"There is no {what} on the Hugging Face Hub, nor a file or folder of that name here. Expected a "
                    "name such as 'sail/poolformer_s12'; a private model needs token=..."
                ) from error
            except errors.LocalEntryNotFoundError as error:
                if self._cached(file) is None:
                    unknown = error
            except errors.EntryNotFoundError:
                pass
        if unknown is None:
            return None
        partly = any(isinstance(self._cached(file), str) for file in self.files)
        lack = f"The Hub's cache of {self.name} has no {' or '.join(files)}"
        nothing = f"{self.name!r} is no file or folder here and not in the Hub's cache"
        raise NotInCache(
            f"{lack if partly else nothing}, and the Hub was not asked or cannot be reached. Connect and leave out "
            "local_files_only and HF_HUB_OFFLINE, or give cache_dir=... that holds it."
        ) from unknown

    def _cached(self, file: str) -> Any:
        """A path, or None for a file that was never asked for; for one that the repository lacks, a mark of that."""
        from huggingface_hub import try_to_load_from_cache

        return try_to_load_from_cache(self.name, file, **self._of_cache)
