"""The training loop, from a recipe to a trained model."""

import contextlib
import dataclasses
import itertools
import logging
import math
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console

from poolformer_jax.errors import PoolFormerError
from poolformer_jax.files import write_json
from train.compute.distributed import StopRequest, initialize
from train.compute.evaluation import Evaluation, evaluate
from train.compute.sharding import process_part, to_devices
from train.compute.state import TrainState
from train.compute.step import Metrics
from train.config import TrainConfig
from train.data import Batches, evaluation_batches, evaluation_steps, open_source, train_batches
from train.folders import lock_folder
from train.report import results
from train.report.journal import Journal
from train.report.progress import Meter, Record
from train.resume.checkpoints import Checkpoints, wait_for_the_same_states
from train.resume.same_run import (
    identify,
    kept_network,
    refuse_another_run,
    refuse_unlike_processes,
    told_of_lost_steps,
    with_network,
)
from train.setup import Assembly, assemble

_LOG = logging.getLogger(__name__)
# Before a profile begins: compiling, filling the data pipeline, and what else happens once.
_STEPS_TO_WARM_UP = 10


class TrainingError(PoolFormerError):
    """The run cannot go on; its last good checkpoint stands."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: steps done.
        evaluations: of the whole evaluation split at the end, by kind of weights; empty if the run was stopped.
        stopped_by: the signal that stopped it, or None.
    """

    step: int
    evaluations: dict[str, Evaluation]
    stopped_by: signal.Signals | None


def run(config: TrainConfig, console: Console) -> Outcome:
    """Trains as `config` says, on from the newest checkpoint in `config.run_dir` if there is one.

    Raises:
        ValueError: if the parts of the recipe, the data, the devices and the run's folder do not fit each other.
        TrainingError: if the gradient stays without a finite value, or the held-out loss has none at the end.
        CheckpointError: if states can be neither written nor read.
    """
    with StopRequest() as stop:
        initialize(config.distributed)
        patience = config.distributed.timeout
        stop.listen_for_sigterm()
        source = open_source(config.data, config.data.train_split)
        stop.before_training()
        held_out = open_source(config.data, config.data.evaluation_split)
        refuse_unlike_processes(config, source, held_out)
        stop.before_training()
        wait_for_the_same_states(config.checkpoints, patience)
        refuse_another_run(config, source)  # before anything is made or cleared away
        parts = assemble(config, source.class_names, len(source), kept=kept_network(config))
        _warn_of_unused_kernels(parts)
        stop.before_training()
        steps_per_epoch, total = config.steps_per_epoch(len(source)), config.total_steps(len(source))
        evaluate_every, save_every = config.evaluate_every * steps_per_epoch, config.save_every or steps_per_epoch
        keep_every = config.keep_every or save_every
        per_evaluation = evaluation_steps(config.data, held_out)
        identity = with_network(identify(config, source), parts.network.model.config)

        with (
            _alone_in_its_folders(config),
            Checkpoints(
                config.checkpoints, identity, config.keep_checkpoints, config.keep_every, patience
            ) as checkpoints,
        ):
            if jax.process_index() == 0:
                write_json(config.run_dir / "recipe.json", config.to_dict())
            state = checkpoints.restore(parts.abstract_state)
            if state is None:
                _warn_of_lost_steps(config)
                state = parts.init(parts.network.argument())
            stop.before_training()
            step = start = int(state.step)
            _warn_of_a_short_profile(config, total - start)
            meter = Meter(start, config.log_every, steps_per_epoch, config.data.batch_size)
            with (
                Journal(config, console, start, total, steps_per_epoch) as journal,
                train_batches(config.data, source, start_step=start, **process_part(parts.mesh)) as batches,
                evaluation_batches(config.data, held_out, repeat=True, **process_part(parts.mesh)) as unseen,
                contextlib.ExitStack() as profile,
            ):

                def note(records: list[Record]) -> None:
                    journal.advance(meter.step)
                    for record in records:
                        journal.train(record)
                        _refuse_to_go_on_blind(record, config)
                    checkpoints.check()

                while step < total and not stop.at(step):
                    # Once the state is saved and no stop is asked for; a run that goes on from it makes up for this.
                    if step and step % evaluate_every == 0 and journal.lacks_evaluation(step):
                        with meter.paused():
                            journal.evaluation(step, _evaluate(parts, state, unseen, per_evaluation))
                    with meter.waiting():
                        batch = next(batches)
                    state, metrics = parts.step(
                        state, to_devices(parts.mesh, {k: batch[k] for k in ("image", "label")})
                    )
                    step += 1
                    _profile(config, step - start, metrics, profile)
                    # No signal is looked at during an evaluation, which may last longer than a preemption waits.
                    saves = any(step % every == 0 for every in (save_every, keep_every, evaluate_every))
                    # Before the state is saved, so that a run that goes on from it lacks no line.
                    note(meter.add(metrics, wait=saves))
                    if saves:
                        with meter.paused():
                            checkpoints.save(state)
                note(meter.rest())
                checkpoints.save(state, last=True)
                if step < total:
                    return Outcome(step, {}, stop.signal)
                evaluations = _evaluate(parts, state, unseen, per_evaluation)
                journal.evaluation(step, evaluations)
                _refuse_a_broken_model(evaluations, config)
            finished = step == config.optimizer.total_epochs * steps_per_epoch  # and not at max_steps before
            results.write(config, parts, state, held_out, evaluations, finished)
    return Outcome(step, evaluations, None)


def _warn_of_unused_kernels(parts: Assembly) -> None:
    if parts.kernel_verification is not None and parts.kernel_verification.problem:
        _LOG.warning("%s", parts.kernel_verification.warning)


@contextlib.contextmanager
def _alone_in_its_folders(config: TrainConfig) -> Iterator[None]:
    """Process 0 holds the locks for all processes of the run."""
    given = (str(config.run_dir), config.checkpoints) if jax.process_index() == 0 else ()
    # By their real places: two locks on one folder would refuse each other. A bucket has none, and no lock either.
    folders = {Path(folder).resolve(): folder for folder in given}
    with contextlib.ExitStack() as locks:
        for folder in folders.values():
            refusal = (
                f"A run is going on in {folder}. Expected no other: it would lose what it is saving. Stop that run, "
                "wait for its end, or begin this one in another folder with --run-dir (and --checkpoint-dir, where it "
                "is given)."
            )
            locks.enter_context(lock_folder(folder, refusal))
        yield


def _warn_of_lost_steps(config: TrainConfig) -> None:
    if jax.process_index() == 0 and (told := told_of_lost_steps(config)):
        _LOG.warning("%s", told)


def _evaluate(parts: Assembly, state: TrainState, batches: Batches, steps: int) -> dict[str, Evaluation]:
    """The weights over the whole evaluation split, and their running mean where there is one."""
    weights = {"params": state.params} if state.ema is None else {"params": state.params, "ema": state.ema}
    return evaluate(parts.evaluation_step, weights, itertools.islice(batches, steps), parts.mesh)


def _profile(config: TrainConfig, done: int, metrics: Metrics, profile: contextlib.ExitStack) -> None:
    """Begins and ends the trace that `config` asks for, on process 0; `profile` ends it where the run ends before."""
    if not config.profile_steps or jax.process_index() > 0:
        return
    if done == _STEPS_TO_WARM_UP:
        profile.enter_context(jax.profiler.trace(config.run_dir / "profile"))
    elif done == _STEPS_TO_WARM_UP + config.profile_steps:
        jax.block_until_ready(metrics)
        profile.close()


def _warn_of_a_short_profile(config: TrainConfig, left: int) -> None:
    wanted = _STEPS_TO_WARM_UP + config.profile_steps
    if config.profile_steps and left < wanted and jax.process_index() == 0:
        _LOG.warning(
            "profile_steps=%d: %d steps are left, of which the first %d are not profiled. Expected at least %d for the "
            "whole profile: a larger --max-steps, or another --run-dir.",
            *(config.profile_steps, left, _STEPS_TO_WARM_UP, wanted),
        )


def _refuse_to_go_on_blind(record: Record, config: TrainConfig) -> None:
    """Raises TrainingError where nothing is learnt any more."""
    if record.skipped_in_a_row >= config.max_skipped:
        raise TrainingError(
            f"{record.skipped_in_a_row} steps in a row, up to step {record.step} or shortly before, had no finite "
            f"gradient. Expected fewer than max_skipped={config.max_skipped}. Checkpoints from before them, if any, "
            f"stand in {config.checkpoints}. A lower --optimizer.learning-rate, --optimizer.clip-norm 1, or --dtype "
            "float32 may help."
        )


def _refuse_a_broken_model(evaluations: dict[str, Evaluation], config: TrainConfig) -> None:
    """Raises TrainingError where weights that are finite still have run away: nothing can be classified with them."""
    if not math.isfinite(evaluations["params"].loss):
        raise TrainingError(
            "The loss on the held-out images is not finite: the weights have run away. Expected a lower "
            f"--optimizer.learning-rate, or --optimizer.clip-norm 1, in another folder than {config.run_dir}, whose "
            "states may be of such weights."
        )
