"""The validation set in training: scored whole from time to time, the best score kept, left where the run is to stop."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pretrain import faults
from pretrain.batch import Batch
from pretrain.config import Config, Plan
from pretrain.distributed import Ranks
from pretrain.engine import Engine
from pretrain.logs import log
from pretrain.score import score
from pretrain.stop import StopFlag
from pretrain.watchdog import Watchdog


class LeftError(Exception):
    """An evaluation was left because the run is to stop; raised on all ranks. The score is owed at the next start."""


class Validation:
    """The scores of one run. All ranks make one and call `run` together."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        ranks: Ranks,
        engine: Engine,
        batches: Callable[[], Iterable[Batch]] | None,
        stop: StopFlag,
        watchdog: Watchdog,
        progress: Mapping[str, Any],
    ) -> None:
        """batches: this rank's; None where there is no validation set, and only what `progress` says of one is kept."""
        self._config, self._plan, self._ranks = config, plan, ranks
        self._forward, self._batches = engine.forward, batches
        self._stop, self._watchdog = stop, watchdog
        self.first: dict[str, float] = dict(progress.get("first_scores", {}))
        self.last: dict[str, float] = dict(progress.get("scores", {}))
        self.best: dict[str, float] = dict(progress.get("best", {}))
        self.is_owed = batches is not None and bool(progress.get("owes_score", False))
        """Whether the last pass over the set was left, so that the present step lacks its score."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "owes_score": self.is_owed,
            "first_scores": self.first,
            "scores": self.last,
            "best": self.best,
        }

    def at(self, step: int) -> dict[str, float]:
        """The scores after `step` steps; none where the last evaluation was at another step."""
        return {name: value for name, value in self.last.items() if name != "step"} if self._is(step) else {}

    def is_best(self, step: int) -> bool:
        """Whether no score so far is better than that after `step` steps, if it has one."""
        return self._is(step) and self.best.get("step") == step

    def run(self, step: int) -> dict[str, float]:
        """Score the whole set after `step` steps; returns the metrics. Without a set, none.

        A pass over a large set may take longer than a stopped run is given to save itself: a signal ends it, by
        `LeftError`.
        """
        if self._batches is None:
            return {}
        faults.at("evaluate", step)
        self.is_owed = True
        batches = self._until_stop(self._batches(), step)
        scores = score(self._forward, batches, self._config, self._plan.val_samples, self._ranks)
        self.is_owed = False
        metrics = scores.metrics()
        self.last = metrics | {"step": step}
        if step == 0:
            self.first = metrics
        elif metrics["val/top1"] > self.best.get("val/top1", -1.0):
            self.best = self.last
        if self._ranks.is_main:
            log.info("step %d: %s%s", step, scores, " (best so far)" if self.is_best(step) else "")
        return metrics | ({"val/best_top1": self.best["val/top1"]} if self.best else {})

    def _is(self, step: int) -> bool:
        return self.last.get("step") == step

    def _until_stop(self, batches: Iterable[Batch], step: int) -> Iterator[Batch]:
        """The batches, until a rank was asked to stop: then `LeftError`, after the same batch on all ranks."""
        is_stopped: Callable[[], bool] | None = None
        for batch in batches:
            if is_stopped is not None and is_stopped():
                raise LeftError
            self._watchdog.beat(step)
            is_stopped = self._ranks.start_any(bool(self._stop))
            yield batch
        if is_stopped is not None:
            is_stopped()  # too late: the pass is complete
