from .checkpoints import CheckpointError as CheckpointError, saved_steps as saved_steps
from .run_comparison import (
    FREE_TO_DIFFER as FREE_TO_DIFFER,
    describe_changes as describe_changes,
    network_to_dict as network_to_dict,
)
from .same_run import Run as Run, find_run as find_run, open_run as open_run
