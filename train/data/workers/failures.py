"""The error for a worker process that failed: Grain gives an exit code, this adds the usual causes and remedies."""

import errno

from poolformer_jax.errors import PoolFormerError

SHARED_MEMORY_ADVICE = (
    "Give a container more shared memory: docker run --shm-size 8g; in Kubernetes, mount an emptyDir with medium: "
    "Memory at /dev/shm. Or use less: fewer --data.workers (in evaluate: --workers), --data.worker-batches 1, a "
    "smaller batch, or --data.workers 0, which makes the batches in a thread of the program."
)


class WorkerError(PoolFormerError, ChildProcessError):
    """A worker process that ended early or did not start."""


def is_worker_failure(error: Exception) -> bool:
    """True if an error that Grain raises with workers means that one ended (RuntimeError) or found no shared memory."""
    return isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC)


def worker_error(error: Exception) -> WorkerError:
    """The error to show for it, with the usual causes and their remedies."""
    return WorkerError(
        f"A data worker failed: {error}\n"
        f"Exit code -7 (SIGBUS), or no space left: /dev/shm, which holds the workers' batches, is full. "
        f"{SHARED_MEMORY_ADVICE}\n"
        "Exit code -9 (SIGKILL): usually Linux ended it because the host or the container ran out of memory. Use fewer "
        "workers, --data.worker-batches 1 or a smaller batch, or give the container more memory.\n"
        "Any other: see the worker's output above. `python -m train doctor RECIPE` looks for damaged images and says "
        "how much memory the workers need.\n"
        "The same command continues a run from its newest checkpoint."
    )
