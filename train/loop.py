"""The training loop, from a recipe to a trained model."""

import dataclasses
import functools
import itertools
import logging
import math
import signal
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from rich.console import Console

from poolformer_jax.errors import PoolFormerError
from train.compute import (
    AnyEvaluation,
    StopRequest,
    TrainState,
    current_weights,
    evaluate,
    evaluations_without_better,
    initialize,
    open_batches,
    to_devices,
    update_best,
    weights_to_publish,
)
from train.config import TrainConfig
from train.data import (
    Source,
    describe_skipped,
    evaluation_steps,
    open_source,
)
from train.report import Journal, Log, Profiler, Record, print_header, write_results
from train.resume import open_run
from train.setup import RunParts, find_class_weights, make_parts

_LOG = logging.getLogger(__name__)


class DivergedError(PoolFormerError):
    """The training diverged; earlier checkpoints are intact."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: steps done.
        evaluations: of the weights that it publishes, on the whole evaluation split, by kind; empty if it was stopped.
        stopped_by: the signal that stopped it, or None.
    """

    step: int
    evaluations: dict[str, AnyEvaluation]
    stopped_by: signal.Signals | None


class Timetable:
    """The steps at which a run on `images` training images evaluates, saves and ends."""

    def __init__(self, config: TrainConfig, images: int) -> None:
        self.steps_per_epoch = config.steps_per_epoch(images)
        self.total = config.total_steps(images)
        self.schedule_ends = self.total == config.optimizer.total_epochs * self.steps_per_epoch
        self._evaluate_every = config.evaluate_every * self.steps_per_epoch
        self._patience = config.patience
        save_every = config.save_every or self.steps_per_epoch
        self._save_every = (save_every, config.keep_every or save_every, self._evaluate_every)

    def is_over(self, state: TrainState) -> bool:
        """True if `state` is the last one, because the steps are done or --patience is exhausted."""
        return int(state.step) >= self.total or self.is_out_of_patience(state)

    def is_out_of_patience(self, state: TrainState) -> bool:
        """True after --patience evaluations in a row without a better --keep-best."""
        return self._patience is not None and evaluations_without_better(state) >= self._patience

    def evaluates_at(self, step: int) -> bool:
        """True if `step` steps are a multiple of --evaluate-every."""
        return step > 0 and step % self._evaluate_every == 0

    def saves_at(self, step: int) -> bool:
        """True if the state after `step` steps is saved: also before every evaluation, which may take long."""
        return any(step % every == 0 for every in self._save_every)


def fit(config: TrainConfig, log: Log | None = None) -> Outcome:
    """Trains as `python -m train` does, in this process: with checkpoints, resuming, evaluations and the report.

    A run whose folder, `config.run_dir`, has a checkpoint resumes from it. Ctrl-C stops the run and saves its state. On
    several hosts, call `jax.distributed.initialize()` before; `config.distributed` is not used.

    Args:
        config: the run, such as `RECIPES["digits"].config` with `dataclasses.replace`.
        log: called as log(step, {"train/loss": 0.5, ...}) with the figures of every interval and evaluation; on process
            0 of several.

    Returns:
        The step, and the evaluations of the weights in `config.run_dir / "model"`, by kind of weights.

    Raises:
        InputError, DivergedError, CheckpointError: as the program reports them.
    """
    return run(config, Console(stderr=True), log, join=False)


def run(config: TrainConfig, console: Console, log: Log | None = None, join: bool = True) -> Outcome:
    """Trains as `config` says, resuming from the newest checkpoint in `config.run_dir` if it has one.

    Args:
        config: the run.
        console: shows the progress.
        log: on process 0, gets the figures of every interval and evaluation.
        join: whether to join the run's other processes, as `config.distributed` says.

    Raises:
        InputError: if the recipe, the data, the devices and the run's folder do not fit each other.
        DivergedError: if too many gradients in a row are not finite, or the final held-out loss is not.
        CheckpointError: if states cannot be written or read.
    """
    with StopRequest() as stop:
        if join:
            initialize(config.distributed)
        stop.listen_for_sigterm()

        source = open_source(config.data, config.data.train_split)
        held_out = open_source(config.data, config.data.evaluation_split)
        stop.check_interrupt()
        found = open_run(config, source, held_out)
        stop.check_interrupt()
        _report_data(config, source, console)
        parts = make_parts(
            config,
            source.class_names,
            len(source),
            checkpoint_network=found.network,
            class_weights=find_class_weights(config, source),
            use_features=True,
        )
        _warn_of_unused_kernels(parts)
        print_header(config, console, parts, source, held_out)
        stop.check_interrupt()

        with found.open_checkpoints(parts.network.model.config) as checkpoints:
            state = checkpoints.restore(parts.abstract_state) or parts.init(parts.network.argument())
            stop.check_interrupt()
            start, times = int(state.step), Timetable(config, len(source))
            with (
                Journal(config, console, start, times.total, times.steps_per_epoch, log) as journal,
                Profiler(config, times.total - start) as profiler,
                open_batches(config, source, held_out, parts.mesh, start, parts.feature_step, state.variables()) as (
                    batches,
                    split,
                ),
            ):
                evaluate_weights = functools.partial(
                    _evaluate, parts=parts, batches=split, steps=evaluation_steps(config.data, held_out)
                )
                for step in itertools.count(start):
                    if step >= times.total or stop.at(step):
                        break
                    # Before the step, so that a run that died during this evaluation evaluates when it resumes. The
                    # saved state does not have the best weights of this step yet.
                    if times.evaluates_at(step) and (state.best or not journal.has_evaluation(step)):
                        with journal.paused():
                            state, _ = _evaluate_state(state, config, journal, evaluate_weights)
                        if times.is_out_of_patience(state):
                            journal.say(f"Ended early: no better {config.keep_best} in {config.patience} evaluations.")
                            break
                    with journal.waiting_for_data():
                        batch = next(batches)
                    state, metrics = parts.step(state, to_devices(parts.mesh, batch, ("image", "label")))
                    profiler.step(metrics)
                    saves = times.saves_at(step + 1)
                    # The journal before the checkpoint, so that a resumed run has all lines up to its state.
                    _check_gradients(journal.step(metrics, wait=saves), config)
                    checkpoints.check()
                    if saves:
                        with journal.paused():
                            checkpoints.save(state)
                _check_gradients(journal.flush(), config)
                checkpoints.save(state, last=True)
                if not times.is_over(state):
                    return Outcome(step, {}, stop.signal)
                if step >= times.total:
                    state, evaluations = _evaluate_state(state, config, journal, evaluate_weights, keep_logits=True)
                if config.keep_best is not None:
                    evaluations = _evaluate_best(state, config, journal, evaluate_weights)
                _check_held_out_loss(evaluations["params"], config)
            finished = times.schedule_ends or times.is_out_of_patience(state)
            write_results(config, parts, state, held_out, evaluations, finished)
    return Outcome(step, evaluations, None)


def _report_data(config: TrainConfig, source: Source, console: Console) -> None:
    """Reports files that are not trained on, and a split that is smaller than a batch."""
    if jax.process_index() > 0:
        return
    if skipped := describe_skipped(source):
        console.print(f"{config.data.source}: {skipped}", highlight=False, markup=False, soft_wrap=True)
    if len(source) < config.data.batch_size:
        _LOG.warning(
            "The split %s has %d images, fewer than a batch of %d: every batch repeats images, and each step counts as "
            "an epoch. Expected a smaller --data.batch-size.",
            config.data.train_split,
            len(source),
            config.data.batch_size,
        )


def _warn_of_unused_kernels(parts: RunParts) -> None:
    if parts.kernel_verification is not None and parts.kernel_verification.problem:
        _LOG.warning("%s", parts.kernel_verification.warning)


def _evaluate(
    weights: Mapping[str, Any],
    parts: RunParts,
    batches: Iterable[Mapping[str, Any]],
    steps: int,
    keep_logits: bool = False,
) -> dict[str, AnyEvaluation]:
    """Evaluates every kind of weights on the whole split."""
    problem = parts.network.model.config.problem_type
    return evaluate(parts.evaluation_step, weights, itertools.islice(batches, steps), parts.mesh, keep_logits, problem)


_EvaluateWeights = Callable[..., dict[str, AnyEvaluation]]


def _evaluate_state(
    state: TrainState,
    config: TrainConfig,
    journal: Journal,
    evaluate_weights: _EvaluateWeights,
    keep_logits: bool = False,
) -> tuple[TrainState, dict[str, AnyEvaluation]]:
    """Evaluates and reports the parameters, and their running mean if there is one; the state with its best weights."""
    evaluations = evaluate_weights(current_weights(state), keep_logits=keep_logits)
    journal.evaluation(int(state.step), evaluations)
    if config.keep_best is not None:
        state = update_best(state, evaluations, config.keep_best)
    return state, evaluations


def _evaluate_best(
    state: TrainState, config: TrainConfig, journal: Journal, evaluate_weights: _EvaluateWeights
) -> dict[str, AnyEvaluation]:
    """Evaluates the best weights, which may be of different steps for different kinds, and says which steps."""
    published = weights_to_publish(state)
    steps = ", ".join(f"{step} ({kind})" for kind, (step, _) in published.items())
    journal.say(f"The best {config.keep_best} was after step {steps}; these weights are published.")
    return evaluate_weights({kind: variables for kind, (_, variables) in published.items()}, keep_logits=True)


def _check_gradients(records: Iterable[Record], config: TrainConfig) -> None:
    """Raises DivergedError after --max-skipped steps in a row without a finite gradient."""
    for record in records:
        if record.skipped_in_a_row >= config.max_skipped:
            raise DivergedError(
                f"{record.skipped_in_a_row} steps in a row, up to step {record.step} or shortly before, had no finite "
                f"gradient. Expected fewer than max_skipped={config.max_skipped}. Checkpoints from before them, if "
                f"any, are in {config.checkpoints}. Try a lower --optimizer.learning-rate, --optimizer.clip-norm 1, or "
                "--dtype float32."
            )


def _check_held_out_loss(evaluation: AnyEvaluation, config: TrainConfig) -> None:
    """Raises DivergedError if the weights are finite but useless."""
    if not math.isfinite(evaluation.loss):
        raise DivergedError(
            "The loss on the held-out images is not finite: the training diverged. Expected a lower "
            f"--optimizer.learning-rate, or --optimizer.clip-norm 1, and another folder than {config.run_dir}, whose "
            "checkpoints may hold the diverged weights."
        )
