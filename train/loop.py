"""The training loop, from a recipe to a trained model."""

import dataclasses
import itertools
import logging
import math
import signal
from collections.abc import Iterable, Mapping
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
from train.data import Source, describe_skipped, evaluation_steps, open_source
from train.report import Journal, Log, Profiler, Record, print_header, write_results
from train.resume import Run, open_run
from train.setup import RunParts, check_memory, find_class_weights, make_parts

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
        self._schedule_ends = self.total == config.optimizer.total_epochs * self.steps_per_epoch
        self._evaluate_every = config.evaluate_every * self.steps_per_epoch
        self._patience = config.patience
        save_every = config.save_every or self.steps_per_epoch
        self._save_every = (save_every, config.keep_every or save_every, self._evaluate_every)

    def is_over(self, state: TrainState) -> bool:
        """True if `state` is the last one, because the steps are done or --patience is exhausted."""
        return int(state.step) >= self.total or self.is_out_of_patience(state)

    def is_finished(self, state: TrainState) -> bool:
        """True if the last `state` ends the whole schedule or exhausts --patience; False if --max-steps ended it."""
        return self._schedule_ends or self.is_out_of_patience(state)

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
    """Trains as `fit` does, shows the progress on `console`, and first joins the other processes if `join`."""
    with StopRequest() as stop:
        if join:
            initialize(config.distributed)
        stop.listen_for_sigterm()
        source, held_out, found, parts = _prepare(config, console, stop)
        with found.open_checkpoints(parts.network.model.config) as checkpoints:
            state = checkpoints.restore(parts.abstract_state) or parts.init(parts.network.argument())
            stop.check_interrupt()
            start, times, mesh = int(state.step), Timetable(config, len(source)), parts.mesh
            with (
                Journal(config, console, start, times.total, times.steps_per_epoch, log) as journal,
                Profiler(config, times.total - start) as profiler,
                open_batches(config, source, held_out, mesh, start, parts.feature_step, state.variables()) as data,
            ):
                batches, split = data
                evaluator = _Evaluator(config, parts, journal, split, evaluation_steps(config.data, held_out))
                for step in range(start, times.total):
                    if stop.at(step):
                        break
                    # Before the step, so that a run that died during this evaluation evaluates when it resumes.
                    if times.evaluates_at(step):
                        state = evaluator.evaluate_unless_resumed(state, step)
                        if times.is_out_of_patience(state):
                            journal.say(f"Ended early: no better {config.keep_best} in {config.patience} evaluations.")
                            break
                    with journal.waiting_for_data():
                        batch = next(batches)
                    state, metrics = parts.step(state, to_devices(mesh, batch, ("image", "label")))
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
                    return Outcome(int(state.step), {}, stop.signal)
                state, evaluations = evaluator.evaluate_at_end(state, trained_to_end=int(state.step) >= times.total)
            write_results(config, parts, state, held_out, evaluations, times.is_finished(state))
    return Outcome(int(state.step), evaluations, None)


def _prepare(config: TrainConfig, console: Console, stop: StopRequest) -> tuple[Source, Source, Run, RunParts]:
    """Opens the training and the held-out images, checks the run's folders, and makes the compiled functions."""
    source = open_source(config.data, config.data.train_split)
    held_out = open_source(config.data, config.data.evaluation_split)
    stop.check_interrupt()
    found = open_run(config, source, held_out)
    stop.check_interrupt()
    _report_data(config, source, console)
    weights = find_class_weights(config, source)
    parts = make_parts(
        config,
        source.class_names,
        len(source),
        checkpoint_network=found.network,
        class_weights=weights,
        use_features=True,
    )
    check_memory(parts)
    if parts.kernel_verification is not None and parts.kernel_verification.problem:
        _LOG.warning("%s", parts.kernel_verification.warning)
    print_header(config, console, parts, source, held_out)
    stop.check_interrupt()
    return source, held_out, found, parts


def _report_data(config: TrainConfig, source: Source, console: Console) -> None:
    """Reports files that are not trained on, and a split that is smaller than a batch."""
    if jax.process_index() > 0:
        return
    if skipped := describe_skipped(source):
        console.print(f"{config.data.source}: {skipped}", highlight=False, markup=False, soft_wrap=True)
    if len(source) < config.data.batch_size:
        _LOG.warning(
            "The split %s has %d images, fewer than a batch of %d: every batch repeats images, and each step counts as "
            "an epoch. Use a smaller --data.batch-size.",
            config.data.train_split,
            len(source),
            config.data.batch_size,
        )


@dataclasses.dataclass(frozen=True)
class _Evaluator:
    """Evaluates weights on the held-out split, `batches` of which `steps` are one pass, and reports to the journal."""

    config: TrainConfig
    parts: RunParts
    journal: Journal
    batches: Iterable[Mapping[str, Any]]
    steps: int

    def evaluate_unless_resumed(self, state: TrainState, step: int) -> TrainState:
        """The state with its best weights, evaluated unless the run resumed from this step and had evaluated it.

        With --keep-best it evaluates then too: the state is saved before its evaluation, without this step's score.
        """
        if not state.best and self.journal.has_evaluation(step):
            return state
        with self.journal.paused():
            return self._evaluate_state(state, keep_logits=False)[0]

    def evaluate_at_end(self, state: TrainState, trained_to_end: bool) -> tuple[TrainState, dict[str, AnyEvaluation]]:
        """The state with its best weights, and the evaluations of the weights to publish, with logits.

        Args:
            state: the last one.
            trained_to_end: False if --patience ended the run, right after an evaluation of `state`.

        Raises:
            DivergedError: if the weights are finite but useless.
        """
        if trained_to_end:
            state, evaluations = self._evaluate_state(state, keep_logits=True)
        if self.config.keep_best is not None:
            evaluations = self._evaluate_best(state)
        if not math.isfinite(evaluations["params"].loss):
            raise DivergedError(
                "The loss on the held-out images is not finite: the training diverged. Expected "
                f"{_remedy(self.config)}, and another folder than {self.config.run_dir}, whose checkpoints may hold "
                "the diverged weights."
            )
        return state, evaluations

    def _evaluate_state(self, state: TrainState, keep_logits: bool) -> tuple[TrainState, dict[str, AnyEvaluation]]:
        """Evaluates and reports the parameters, and their running mean if there is one."""
        evaluations = self._evaluate(current_weights(state), keep_logits)
        self.journal.evaluation(int(state.step), evaluations)
        if self.config.keep_best is not None:
            state = update_best(state, evaluations, self.config.keep_best)
        return state, evaluations

    def _evaluate_best(self, state: TrainState) -> dict[str, AnyEvaluation]:
        """Evaluates the best weights, which may be of different steps for different kinds, and says which steps."""
        published = weights_to_publish(state)
        names = {"params": "those", "ema": "the running mean"}
        chosen = " and ".join(f"{names[kind]} of step {step}" for kind, (step, _) in published.items())
        self.journal.say(f"Publishes the weights with the best {self.config.keep_best}: {chosen}.")
        return self._evaluate({kind: variables for kind, (_, variables) in published.items()}, keep_logits=True)

    def _evaluate(self, weights: Mapping[str, Any], keep_logits: bool) -> dict[str, AnyEvaluation]:
        batches, problem = itertools.islice(self.batches, self.steps), self.parts.network.model.config.problem_type
        return evaluate(self.parts.evaluation_step, weights, batches, self.parts.mesh, keep_logits, problem)


def _remedy(config: TrainConfig) -> str:
    """What may keep a training from diverging that it does not have yet."""
    clips = config.optimizer.with_defaults().clip_norm is not None
    options = ["a lower --optimizer.learning-rate"]
    options += ["--optimizer.clip-norm 1"] * (not clips) + ["--dtype float32"] * (config.dtype == "bfloat16")
    return ", or ".join(options)


def _check_gradients(records: Iterable[Record], config: TrainConfig) -> None:
    """Raises DivergedError after --max-skipped steps in a row without a finite gradient."""
    for record in records:
        if record.skipped_in_a_row >= config.max_skipped:
            raise DivergedError(
                f"{record.skipped_in_a_row} steps in a row, up to step {record.step} or shortly before, had no finite "
                f"gradient. Expected fewer than max_skipped={config.max_skipped}. Checkpoints from before them, if "
                f"any, are in {config.checkpoints}. Try {_remedy(config)}."
            )
