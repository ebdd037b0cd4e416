"""Files of a repository on the Hugging Face Hub, through its cache. Nothing else here asks the Hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# As huggingface_hub checks it, with an owner; it need not be installed to tell a path from a name.
_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\b[\w.-]+\b/\b[\w.-]{1,96}\b")
# Whoever writes these means a file that is not there, and no repository.
_FILES = (".safetensors", ".pth.tar", ".pth", ".bin", ".pt", ".json")


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
        if not _ID.fullmatch(name) or name.endswith(_FILES):
            raise FileNotFoundError(
                f"There is no model at {name}. Expected a model folder, a file in it, or a name on the Hugging Face "
                "Hub such as 'sail/poolformer_s12'."
            )
        try:
            import huggingface_hub  # noqa: F401
        except ImportError:
            raise ModuleNotFoundError(
                f"{name!r} is no file or folder here, and to look for it on the Hugging Face Hub needs "
                "huggingface_hub. Install it with: pip install 'poolformer-jax[hub]'"
            ) from None
        self.name, self.files = name, files
        self._of_cache: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        self._options: dict[str, Any] = {**self._of_cache, "local_files_only": local_files_only, "token": token}

    def find(self, file: str) -> Path | None:
        """Where a file is in the cache, downloaded if need be; None if the repository does not have it.

        Raises:
            FileNotFoundError: if there is no such repository or revision, or nobody can tell.
        """
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(str(hf_hub_download(self.name, file, **self._options)))
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            named = isinstance(error, errors.RevisionNotFoundError)
            what = f"revision {self._options['revision']!r} of {self.name}" if named else self.name
            raise FileNotFoundError(
                f"There is no {what} on the Hugging Face Hub, nor a file or folder of that name here. Expected a name "
                "such as 'sail/poolformer_s12'; a private model needs token=..."
            ) from error
        except errors.LocalEntryNotFoundError as error:
            # Offline nobody knows what a repository lacks. Another file in the cache shows that it was fetched.
            if self._is_cached():
                return None
            raise FileNotFoundError(
                f"{self.name!r} is no file or folder here and not in the Hub's cache, and the Hub was not asked or "
                "cannot be reached. Connect and leave out local_files_only and HF_HUB_OFFLINE, or give cache_dir=... "
                "that holds it."
            ) from error
        except errors.EntryNotFoundError:
            return None

    def _is_cached(self) -> bool:
        from huggingface_hub import try_to_load_from_cache

        return any(isinstance(try_to_load_from_cache(self.name, file, **self._of_cache), str) for file in self.files)
