"""When a run is saved, and what goes with it: the copy that training waits for, the marks, the tidying up."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pretrain.checkpoint import checkpoints
from pretrain.checkpoint.interval import SaveClock
from pretrain.checkpoint.layout import LATEST, folder_of, point, step_of
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.save import Content, Saver, amend, mark_best, prune
from pretrain.config import CheckpointConfig
from pretrain.distributed import Ranks


class Saves:
    """The saves of one run. All ranks make one and call `begin` and `finish` together."""

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        ranks: Ranks,
        after_commit: Callable[[], None],
        mirror: Mirror | None,
    ) -> None:
        """after_commit: what rank 0 does besides, once a checkpoint is published. mirror: rank 0's, if there is one."""
        self._run_dir, self._config, self._ranks = run_dir, config, ranks
        self._after_commit, self._mirror = after_commit, mirror
        self._saver = Saver(run_dir, ranks)
        self._clock = SaveClock(config)
        self._best, self._may_prune = False, True
        self._began = self._stalled = 0.0
        self._since = time.perf_counter()

    @property
    def is_time(self) -> bool:
        """Whether the clock says that it is time to save. Rank 0 decides for all: the trainer lets them agree."""
        return self._ranks.is_main and self._clock.is_due()

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of a pending save is on disk; `finish` waits for nobody once all say so."""
        return self._saver.is_written

    def begin(self, content: Content, *, best: bool, may_prune: bool) -> Mapping[str, float]:
        """Copy what is to be saved and write it in the background. All ranks; the save before is finished first.

        best: whether it is the best by validation so far. may_prune: whether it makes room for itself by deleting old
        ones. Returns the metrics of the save before, if there was one.
        """
        before = self.finish()
        self._best, self._may_prune, self._began = best, may_prune, time.perf_counter()
        self._clock.restart()
        self._saver.begin(content)
        self._stalled = time.perf_counter() - self._began
        return before if self._config.background else self.finish()

    def finish(self) -> Mapping[str, float]:
        """Publish the pending save, if any: wait until it is written, mark it, delete what is too old. All ranks.

        Returns metrics: seconds that training stood still for it, their share of the time since the save before, and
        seconds until it was published.
        """
        if not self._saver.is_pending:
            return {}
        called = time.perf_counter()
        folder = self._saver.commit()
        with self._ranks.together():
            if self._ranks.is_main:
                if self._best:
                    mark_best(self._run_dir, folder)
                in_use = None
                if self._mirror is not None:
                    self._mirror.wake()
                    in_use = self._mirror.in_use()
                if self._may_prune:
                    prune(self._run_dir, self._config.keep, step_of(folder), in_use)
                self._after_commit()
        now = time.perf_counter()
        self._stalled += now - called
        self._clock.learn(self._stalled)
        since, self._since = self._since, now
        return {
            "perf/save_stall_seconds": self._stalled,
            "perf/save_stall_share": self._stalled / (now - since),
            "perf/save_seconds": now - self._began,
        }

    def amend(self, content: Content, *, best: bool) -> None:
        """Give the committed checkpoint of `content.step` the scores that it lacked when it was saved. All ranks."""
        with self._ranks.together():
            if self._ranks.is_main:
                folder = folder_of(self._run_dir, content.step)
                amend(folder, content.progress, content.metrics)
                if best:
                    mark_best(self._run_dir, folder)
                if self._mirror is not None:
                    self._mirror.wake()

    def mend_pointers(self, resumed_step: int, best_step: int) -> None:
        """Rank 0, at the start: a kill between a save and its marks left `latest` or `best` at the one before."""
        resumed = folder_of(self._run_dir, resumed_step)
        if resumed in checkpoints(self._run_dir):
            point(self._run_dir, LATEST, resumed)
        folder = folder_of(self._run_dir, best_step)
        if self._config.keep_best and folder in checkpoints(self._run_dir):
            mark_best(self._run_dir, folder)
        if self._mirror is not None:
            self._mirror.wake()

    def mirror_metrics(self) -> dict[str, float]:
        """How far the mirror is behind; rank 0's alone, nothing elsewhere."""
        return {} if self._mirror is None else self._mirror.metrics()
