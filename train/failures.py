"""What the program prints, and its exit code, when a run fails."""

import sys

from poolformer_jax.errors import PoolFormerError
from poolformer_jax.messages import printable
from poolformer_jax.process import error_message

DIVERGED = 3  # the exit code
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
_LESS_MEMORY = (
    "Devices need less with --optimizer.accumulate 2 (or more), --dtype bfloat16 or --remat. Hosts need less with "
    "fewer --data.workers or --data.worker-batches 1. Both need less with a smaller --data.batch-size or "
    "--data.image-size, which change what is learnt. `python -m train doctor RECIPE` says how much a run needs."
)


def message_of(error: Exception) -> str | None:
    """The message to print instead of a traceback; None if this looks like a bug."""
    if isinstance(error, ImportError) and not isinstance(error, PoolFormerError):
        return _missing_package(error)
    if (message := _lost_process(error)) is not None:
        return message
    if isinstance(error, MemoryError):
        return f"This host has run out of memory. {error}".rstrip() + f"\n{_LESS_MEMORY}"
    if (message := error_message(error)) is not None:
        return message
    import jax

    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    return f"A device has run out of memory. {error}\n{_LESS_MEMORY}" if _OUT_OF_MEMORY in str(error) else None


def exit_code(error: Exception) -> int:
    """DIVERGED if another attempt would diverge too, otherwise 1."""
    loop = sys.modules.get("train.loop")  # missing if the error came before its import
    return DIVERGED if loop is not None and isinstance(error, loop.DivergedError) else 1


def _lost_process(error: Exception) -> str | None:
    """With several processes, a failed computation most often means that another process has ended."""
    compute = sys.modules.get("train.compute")  # missing if the error came before its import
    if compute is None or not compute.has_other_processes():
        return None
    import jax

    causes: list[BaseException] = [error]
    while (before := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(before)
    failed = [one for one in causes if isinstance(one, jax.errors.JaxRuntimeError) or "Gloo" in str(one)]
    if not failed or _OUT_OF_MEMORY in str(failed[-1]):
        return None
    return str(compute.lost_process_message(printable(str(failed[-1]), 200)))


def _missing_package(error: ImportError) -> str | None:
    if (error.name or "").partition(".")[0] in ("train", "poolformer_jax"):
        return None
    return f"{error}\nInstall what training needs with: pip install -e '.[train]' (for gs:// buckets '.[train,gcs]')"
