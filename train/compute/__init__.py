"""The computation: mesh and shardings, state, optimizer, training step, evaluation, and the processes of a run."""

from typing import TYPE_CHECKING

from poolformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from train.compute.distributed import from_process_0 as from_process_0
    from train.compute.distributed import has_other_processes as has_other_processes
    from train.compute.distributed import initialize as initialize
    from train.compute.distributed import processes_where as processes_where
    from train.compute.distributed import refuse_different_processes as refuse_different_processes
    from train.compute.evaluation import Evaluation as Evaluation
    from train.compute.evaluation import EvaluationStep as EvaluationStep
    from train.compute.evaluation import evaluate as evaluate
    from train.compute.evaluation import make_evaluation_step as make_evaluation_step
    from train.compute.optimizer import make_optimizer as make_optimizer
    from train.compute.optimizer import make_schedule as make_schedule
    from train.compute.preemption import StopRequest as StopRequest
    from train.compute.sharding import BATCH_AXES as BATCH_AXES
    from train.compute.sharding import batch_sharding as batch_sharding
    from train.compute.sharding import check_batch as check_batch
    from train.compute.sharding import make_mesh as make_mesh
    from train.compute.sharding import process_part as process_part
    from train.compute.sharding import replicated as replicated
    from train.compute.sharding import state_shardings as state_shardings
    from train.compute.sharding import to_devices as to_devices
    from train.compute.sharding import to_host as to_host
    from train.compute.state import TrainState as TrainState
    from train.compute.state import new_state as new_state
    from train.compute.step import make_train_step as make_train_step

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "distributed": "from_process_0 has_other_processes initialize processes_where refuse_different_processes",
        "evaluation": "Evaluation EvaluationStep evaluate make_evaluation_step",
        "optimizer": "make_optimizer make_schedule",
        "preemption": "StopRequest",
        "sharding": "BATCH_AXES batch_sharding check_batch make_mesh process_part replicated "
        "state_shardings to_devices to_host",
        "state": "TrainState new_state",
        "step": "make_train_step",
    },
)
