"""Downloads from the Hugging Face Hub through its cache, and uploads. No other module of this package uses the Hub."""

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypedDict, Unpack

from poolformer_jax.errors import InputError, MissingDependencyError, MissingFileError
from poolformer_jax.files import write_json

# huggingface_hub's rule for names, with an owner. A missing path is recognised without huggingface_hub.
_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\b[\w.-]+\b/\b[\w.-]{1,96}\b")
CONFIG = "config.json"  # the network; timm's also has the preprocessing
# Options that only say how to reach the Hub: a script may give them with every source.
ACCESS_OPTIONS = ("cache_dir", "local_files_only", "token")
WEIGHTS_ENDINGS = (".safetensors", ".pth.tar", ".pth", ".bin", ".pt", ".ckpt")


class NotInCache(MissingFileError):
    """A file that is not in the cache. It may be on the Hub, which is unreachable or which the caller did not allow."""


class HubOptions(TypedDict, total=False):
    """The keyword arguments with which every function that loads from the Hub looks for a repository."""

    revision: str | None  # branch, tag or commit
    cache_dir: str | os.PathLike[str] | None  # the Hub's cache; by default huggingface_hub's (HF_HOME)
    local_files_only: bool  # use the cache without asking the Hub, as with HF_HUB_OFFLINE=1
    token: str | bool | None  # for private models; by default the one stored by `hf auth login`


def check_no_revision(path: Path, revision: str | None) -> None:
    """Raises InputError for a revision of a path on this machine, which has none.

    "main" is allowed, because transformers' example scripts pass it by default.
    """
    if revision not in (None, "main"):
        raise InputError(
            f"revision={revision!r} was given with {path}, which is on this machine and has no revisions. Expected "
            "none, or a name on the Hugging Face Hub for which there is no such path here."
        )


class Repository:
    """A repository on the Hub.

    Args:
        name: such as "sail/poolformer_s12".
        files: the names that `find` may be called with.
        options: where to look for it.

    Raises:
        MissingFileError: if this is not the name of a repository.
        MissingDependencyError: if huggingface_hub is not installed.
    """

    def __init__(self, name: str, files: Sequence[str], **options: Unpack[HubOptions]) -> None:
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
                "with: pip install -e '.[hub]'"
            ) from None
        self.name, self.files = name, files
        self._options: dict[str, Any] = {**options}

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
                missing = f"revision {self._options.get('revision')!r} of {self.name}" if wrong_revision else self.name
                raise MissingFileError(
                    f"There is no {missing} on the Hugging Face Hub, and no file or folder of that name here. Expected "
                    "a name such as 'sail/poolformer_s12'; a private model needs a token (hf auth login)"
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
            "HF_HUB_OFFLINE, or name the cache that has it (HF_HOME, cache_dir=..., --cache-dir)."
        ) from unknown

    def _cached(self, file: str) -> Any:
        """The path in the cache; None if never requested; another object if the repository is known to lack it."""
        from huggingface_hub import try_to_load_from_cache

        revision, cache_dir = self._options.get("revision"), self._options.get("cache_dir")
        return try_to_load_from_cache(self.name, file, revision=revision, cache_dir=cache_dir)


def push_to_hub(
    repo_id: str,
    save: Callable[[Path], object],
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads the files that `save` writes, in one commit. The repository is created if it does not exist.

    A README.md that the repository already has is kept.

    Args:
        repo_id: "owner/name"; a name without an owner belongs to the token's user.
        save: writes the files into the folder that it is called with.
        commit_message: by default "Upload with poolformer_jax".
        commit_description: further lines of the commit.
        private: whether a new repository is private; by default what its owner has set on the Hub.
        token: by default the one stored by `hf auth login`.
        revision: the branch, created if it does not exist; by default the main one.
        create_pr: whether to open a pull request instead of committing to the main branch.

    Returns:
        The address of the commit.

    Raises:
        MissingDependencyError: if huggingface_hub is not installed.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses, for example because the token is wrong.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise MissingDependencyError(
            "Uploading to the Hugging Face Hub needs huggingface_hub. Install it with: pip install -e '.[hub]'"
        ) from None
    hub = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / repo_id.split("/")[-1]  # the model card's title
        folder.mkdir()
        save(folder)
        repository = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            hub.create_branch(repository, branch=revision, exist_ok=True)
        keep_readme = hub.file_exists(repository, "README.md", revision=revision)
        commit = hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message or "Upload with poolformer_jax",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=["README.md"] if keep_readme else None,
        )
    return str(commit.pr_url or commit.commit_url)


class SavedAsJson:
    """Settings that are one JSON file of a model folder."""

    file_name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """All fields as values for JSON."""
        raise NotImplementedError

    def to_json_file(self, file: str | os.PathLike[str]) -> None:
        """Writes the file under any name, whole or not at all."""
        write_json(Path(file).expanduser(), self.to_dict())

    def save_pretrained(self, folder: str | os.PathLike[str], push_to_hub: bool = False, **hub_options: Any) -> None:
        """Writes the file into `folder`, whole or not at all.

        Args:
            folder: the folder, created if needed.
            push_to_hub: also upload the file, to `repo_id` of `hub_options` or a repository with the folder's name.
            hub_options: as in `push_to_hub`.
        """
        self.to_json_file(Path(folder) / self.file_name)
        if push_to_hub:
            self.push_to_hub(hub_options.pop("repo_id", Path(folder).name), **hub_options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the file to the Hugging Face Hub.

        Args:
            repo_id: "owner/name"; the repository is created if it does not exist.
            options: commit_message, private, token, revision, create_pr.

        Returns:
            The address of the commit.

        Raises:
            ModuleNotFoundError: if huggingface_hub is not installed.
        """
        return push_to_hub(repo_id, self.save_pretrained, **options)
