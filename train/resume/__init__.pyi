from .checkpoints import CheckpointError as CheckpointError, saved_steps as saved_steps
from .same_run import (
    FREE_TO_DIFFER as FREE_TO_DIFFER,
    Run as Run,
    describe_changes as describe_changes,
    find_run as find_run,
    network_to_dict as network_to_dict,
    open_run as open_run,
)
