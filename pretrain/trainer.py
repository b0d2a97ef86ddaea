"""The training loop of one stage: get a batch, step, say how it goes, evaluate, save, stop.

Pretraining and fine-tuning are the same loop under another config. Everything that decides about a collective (log,
evaluate, save, stop) is a function of the step or was agreed by all ranks.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm import tqdm

from pretrain import faults
from pretrain.batch import Batch
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.save import Content
from pretrain.config import Config, Plan
from pretrain.data.quarantine import BadSample, Quarantine
from pretrain.data.skipped import NOTHING, Skipped
from pretrain.data.state import distinct_seen, source_epochs
from pretrain.distributed import Ranks, StepExchange, StepFacts
from pretrain.engine import Engine
from pretrain.errors import PeerError, ReplicaError
from pretrain.logs import log
from pretrain.metrics import Meter
from pretrain.optim import lr_at
from pretrain.pace import Pace
from pretrain.profiling import StepProfile
from pretrain.recovery import BadSteps, Rollback
from pretrain.replicas import check_replicas
from pretrain.saving import Saves
from pretrain.stop import StopFlag
from pretrain.tracking import Tracker
from pretrain.validation import LeftError, Validation
from pretrain.watchdog import Watchdog


class TrainBatches(Protocol):
    """What the trainer asks of a loader."""

    wait_seconds: float
    """Time spent waiting for data so far."""

    def steps(self, first_step: int, skipped: Skipped) -> Iterator[Sequence[Batch]]:
        """For each step from `first_step` on, without end, the micro-batches of this rank; none of skipped batches."""

    def take_bad(self) -> Sequence[BadSample]:
        """Bad samples that were replaced in the steps handed out since the last call."""


@dataclass(frozen=True)
class Start:
    """Where the loop begins: after `step` updates, with what the checkpoint says of the way there."""

    step: int = 0
    progress: Mapping[str, Any] | None = None
    skipped: Skipped = NOTHING


@dataclass(frozen=True)
class Outcome:
    """How the loop ended, after how many updates; scores on the validation set right after a hand-off, last, best: the
    latter two with the step that they are of."""

    status: Literal["finished", "interrupted"]
    step: int
    first_scores: Mapping[str, float]
    scores: Mapping[str, float]
    best: Mapping[str, float]
    rollbacks: Sequence[Rollback]


class Trainer:
    """All ranks construct one and call `run`. `tracker` is rank 0's alone, `validation` gives this rank's batches,
    `figures` draws those of a step and returns their numbers, on all ranks together."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        ranks: Ranks,
        engine: Engine,
        batches: TrainBatches,
        validation: Callable[[], Iterable[Batch]] | None,
        figures: Callable[[int], Mapping[str, float]] | None,
        quarantine: Quarantine,
        meter: Meter,
        run_dir: Path,
        data_state: Callable[[int, Skipped], Mapping[str, Any]],
        stop: StopFlag,
        start: Start,
        tracker: Tracker | None,
        watchdog: Watchdog,
        mirror: Mirror | None,
    ) -> None:
        self.config = config
        self.plan = plan
        self.ranks = ranks
        self.engine = engine
        self.batches = batches
        self.figures = figures
        self.quarantine = quarantine
        self.meter = meter
        self.run_dir = run_dir
        self.data_state = data_state
        self.stop = stop
        self.tracker = tracker
        self.watchdog = watchdog
        self._pace = Pace(ranks)
        self._own_wait, self._paced_step = 0.0, start.step
        self.step = start.step
        self.skipped = start.skipped
        progress = dict(start.progress or {})
        self.skipped_steps = int(progress.get("skipped_steps", 0))
        self.bad_samples = int(progress.get("bad_samples", 0))
        self.rollbacks: list[Rollback] = list(progress.get("rollbacks", ()))
        self._bad_steps = BadSteps(config.recovery, plan.global_batch, progress)
        self._validation = Validation(config, plan, ranks, engine, validation, stop, watchdog, progress)
        self._saves = Saves(run_dir, config.checkpoint, ranks, quarantine.merge, mirror)
        self._exchange = StepExchange(ranks)
        self._profile = StepProfile(config.profile, ranks, run_dir)
        self._waited = batches.wait_seconds
        self._last_step: Mapping[str, Any] = {}
        self._stop_agreed = self._save_agreed = self._all_written = False

    def run(self) -> Outcome:
        """Train to the plan's last step, or until a signal asked to stop; either way the end is checkpointed.

        Raises `DataError` on all ranks, after a checkpoint, where more samples are bad than the error budget allows,
        and `TroubleError` where it has to go back.
        """
        self.quarantine.check(self.bad_samples, self._distinct_seen())
        if self.ranks.is_main:
            self._saves.mend_pointers(self.step, int(self._validation.best.get("step", -1)))
        if self.step == 0 and self.config.init is not None:
            self._evaluate()  # the hand-off's own score, before anything is learnt
        elif self._validation.is_owed:
            improved = self._evaluate()
            if not self._validation.is_owed:
                self._saves.amend(self._content(), best=improved)
        saved_at = self.step
        if self.step < self.plan.total_steps and not self._stop_agreed:
            with self._progress_bar() as bar:
                for micro_batches in self.batches.steps(self.step, self.skipped):
                    self._train_step(micro_batches)
                    bar.update()
                    if self._is_due(self.plan.log_every_steps):
                        self._log(bar)
                    check = self.config.recovery.check_replicas_every_steps
                    if check is not None and self.step % check == 0:
                        self._check_replicas()
                    if self._bad_steps.is_trouble:
                        self._profile.finish()
                        self._finish_save()
                        raise self._bad_steps.trouble(self.skipped, self.rollbacks)
                    if self.figures is not None and self._is_due(self.config.train.figures_every_steps):
                        self._draw(self.figures)
                    improved = self._is_due(self.plan.eval_every_steps) and self._evaluate()
                    due = self._save_agreed or self._is_due(self.plan.save_every_steps)
                    due = due and self._is_sound()
                    if improved or due or self._stop_agreed:
                        self._save(best=improved)
                        saved_at = self.step
                    elif self._all_written:
                        self._finish_save()
                    if self._stop_agreed or self.step == self.plan.total_steps:
                        break
        self._profile.finish()
        finished = self.step >= self.plan.total_steps and not self._validation.is_owed
        if saved_at != self.step:
            self._save(best=False)
        self._finish_save()
        self.quarantine.check(self.bad_samples, self._distinct_seen())
        return Outcome(
            "finished" if finished else "interrupted",
            self.step,
            self._validation.first,
            self._validation.last,
            self._validation.best,
            self.rollbacks,
        )

    def _train_step(self, micro_batches: Sequence[Batch]) -> None:
        if faults.at("step", self.step):
            micro_batches[0].weights[0] = math.nan
        lr = lr_at(self.step, self.plan)
        waited, self._waited = self.batches.wait_seconds - self._waited, self.batches.wait_seconds
        with self._profile.step(self.step + 1, waited):
            output = self.engine.step(micro_batches, lr, self._profile.timed)
        self.step += 1
        self.skipped_steps += not output.applied
        self._last_step = {"train/lr": lr, "train/grad_norm": output.grad_norm}
        self.watchdog.beat(self.step)
        self._own_wait += waited
        bad = self.quarantine.record(self.batches.take_bad())
        facts = self._exchange.push(
            self.step,
            output.loss_sum,
            applied=output.applied,
            stop=bool(self.stop),
            wait_seconds=waited,
            bad_samples=bad,
            save_due=self._saves.is_time,
            save_written=self._saves.is_written,
        )
        if facts is not None:
            self._learn([facts])

    def _learn(self, facts: Sequence[StepFacts]) -> None:
        """Take in what all ranks now know of earlier steps."""
        self.meter.add(facts)
        for words in self._bad_steps.add(facts):
            if self.ranks.is_main:
                log.warning(words)
        self.bad_samples += round(sum(fact.bad_samples for fact in facts))
        over_budget = self.bad_samples > 0 and not self.quarantine.allows(
            self.bad_samples, self._distinct_seen()
        )
        self._stop_agreed = self._stop_agreed or over_budget or any(fact.stops > 0 for fact in facts)
        self._save_agreed = self._save_agreed or any(fact.saves_due > 0 for fact in facts)
        self._all_written = any(fact.saves_written == self.ranks.size for fact in facts)

    def _is_sound(self) -> bool:
        """Whether the last step was a good one: a checkpoint from before bad ones must not make room for one of them."""
        self._learn(self._exchange.drain())
        return self._bad_steps.in_a_row == 0

    def _distinct_seen(self) -> int:
        return distinct_seen(self.step, self.plan, self.config.run.seed, self.skipped)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and (self.step % every == 0 or self.step == self.plan.total_steps)

    def _draw(self, figures: Callable[[int], Mapping[str, float]]) -> None:
        with self._outside_of_speed():
            self._learn(self._exchange.drain())
            self._track(figures(self.step))

    def _log(self, bar: "tqdm[Any]") -> None:
        self._learn(self._exchange.drain())
        metrics = self.meter.record() | self._spread() | self._saves.mirror_metrics()
        metrics |= {name: float(value) for name, value in self._last_step.items()}
        metrics |= {
            "train/epoch": self.step * self.plan.global_batch / self.plan.train_samples,
            "train/samples": self.step * self.plan.global_batch,
            "train/skipped_steps": self.skipped_steps,
            "train/rollbacks": len(self.rollbacks),
            "data/bad_samples": self.bad_samples,
        }
        if len(self.plan.sources) > 1 or self.plan.repeats > 1:  # else it is the epoch
            passes = source_epochs(self.step, self.plan, self.config.run.seed, self.skipped)
            metrics |= {f"data/epoch/{name}": value for name, value in passes.items()}
        self._track(metrics)
        speed = metrics["perf/images_per_second"]
        bar.set_postfix_str(f"loss {metrics['train/loss']:.4f}, {speed:.0f} images/s", refresh=False)
        if bar.disable and self.ranks.is_main:
            log.info(
                "step %d/%d  loss %.4f  lr %.3g  %.0f images/s  waiting for data %.1f %%",
                self.step, self.plan.total_steps, metrics["train/loss"], metrics["train/lr"], speed,
                100 * metrics["perf/data_wait_share"],
            )  # fmt: skip

    def _spread(self) -> dict[str, float]:
        own, self._own_wait = self._own_wait + self.engine.take_forward_seconds(), 0.0
        steps, self._paced_step = self.step - self._paced_step, self.step
        return self._pace.record(own, steps)

    def _evaluate(self) -> bool:
        """Score the validation set; returns whether this step is to be kept as the best so far."""
        with self._outside_of_speed():
            self._learn(self._exchange.drain())
            try:
                self._track(self._validation.run(self.step))
            except LeftError:
                self._stop_agreed = True
                return False
        return self.config.checkpoint.keep_best and self._validation.is_best(self.step)

    def _save(self, *, best: bool) -> None:
        self.watchdog.beat(self.step)
        with self._outside_of_speed():
            if self.config.recovery.check_replicas_every_steps is not None:
                self._check_replicas()
            self._learn(self._exchange.drain())
            if self.tracker is not None:
                self.tracker.sync()
            # in the middle of bad steps the checkpoint before them may be the one to go back to
            may_prune = self._bad_steps.in_a_row == 0
            self._track(self._saves.begin(self._content(), best=best, may_prune=may_prune))
            self._save_agreed = self._all_written = False

    def _check_replicas(self) -> None:
        try:
            check_replicas(self.engine, self.ranks, self.step)
        except (ReplicaError, PeerError):
            self._finish_save()  # of an earlier step, at which they agreed
            raise

    def _finish_save(self) -> None:
        with self._outside_of_speed():
            self._track(self._saves.finish())
            self._all_written = False

    def _content(self) -> Content:
        return Content(
            step=self.step,
            config=self.config,
            plan=self.plan,
            data=self.data_state(self.step, self.skipped),
            progress=self.meter.state()
            | self._bad_steps.state()
            | self._validation.state()
            | {
                "rollbacks": self.rollbacks,
                "skipped_steps": self.skipped_steps,
                "bad_samples": self.bad_samples,
            },
            metrics=self._validation.at(self.step),
            optimizer_steps=self.engine.steps_taken,
            shapes=self.engine.shapes,
            slices=self.engine.slices(),
        )

    def _track(self, metrics: Mapping[str, float]) -> None:
        if self.tracker is not None and metrics:
            self.tracker.metrics(self.step, metrics)

    @contextmanager
    def _outside_of_speed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.meter.exclude(time.perf_counter() - began)

    def _progress_bar(self) -> "tqdm[Any]":
        """A bar on rank 0's terminal; where stderr is a file, `_log` writes lines instead."""
        return tqdm(
            total=self.plan.total_steps,
            initial=self.step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=None if self.ranks.is_main else True,
        )
