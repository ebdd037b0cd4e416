"""Checkpoints, and the checks before a run resumes from them."""

from typing import TYPE_CHECKING

from poolformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from train.resume.checkpoints import CheckpointError as CheckpointError
    from train.resume.checkpoints import saved_steps as saved_steps
    from train.resume.same_run import FREE_TO_DIFFER as FREE_TO_DIFFER
    from train.resume.same_run import Run as Run
    from train.resume.same_run import describe_changes as describe_changes
    from train.resume.same_run import find_run as find_run
    from train.resume.same_run import network_to_dict as network_to_dict
    from train.resume.same_run import open_run as open_run

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "checkpoints": "CheckpointError saved_steps",
        "same_run": "FREE_TO_DIFFER Run describe_changes find_run network_to_dict open_run",
    },
)
