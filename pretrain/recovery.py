"""When training goes wrong: bad steps in a row make the run go back to a checkpoint and pass over what led there.

    bad          a loss or gradient that is not finite (the engine leaves such an update out on all ranks), or, with
                 `recovery.spike_factor`, a loss that far above its recent mean
    in a row     `recovery.after_bad_steps` of them are trouble; no checkpoint is made meanwhile
    going back   to the newest checkpoint before the first of them, or to the one before that where the run went back to it
                 the last time: it may be the beginning of the trouble; later ones are deleted
    passed over  all batches from there to the last bad one: other weights come of other samples
    written      into that checkpoint's manifest, in one atomic replacement: a kill before it goes into the same trouble
                 again, a kill after it goes on as if nothing had been killed

Every rank counts for itself what all of them agreed on (`distributed.StepExchange`), so no rank goes back alone.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain import run_dir
from pretrain.checkpoint import layout
from pretrain.checkpoint.load import newest_valid
from pretrain.checkpoint.save import remove_later
from pretrain.config import RecoveryConfig
from pretrain.data.skipped import Skipped
from pretrain.distributed import Ranks, StepFacts
from pretrain.errors import CheckpointError, DivergedError
from pretrain.logs import log
from pretrain.tracking import Tracker

RECENT_STEPS = 100
"""Steps whose mean loss a spike is measured against; before so many have been good, no loss is a spike."""


Rollback = Mapping[str, Any]
"""That a run went back: to_step, the batches [first, last] of the order that it passed over, and why."""


class TroubleError(Exception):
    """Steps `first` to `last` (1 is the run's first) were bad; raised on all ranks at the same step."""

    def __init__(
        self, first: int, last: int, what: str, skipped: Skipped, rollbacks: Sequence[Rollback]
    ) -> None:
        """skipped, rollbacks: of the run so far."""
        super().__init__(f"{f'steps {first} to {last}' if first < last else f'step {last}'}: {what}")
        self.first, self.last, self.skipped, self.rollbacks = first, last, skipped, rollbacks


class BadSteps:
    """Counts bad steps in a row. Its state is part of the checkpoint."""

    def __init__(self, config: RecoveryConfig, global_batch: int, progress: Mapping[str, Any]) -> None:
        self._config, self._global_batch = config, global_batch
        self._good = int(progress.get("good_steps", 0))
        self._mean = float(progress.get("mean_loss", 0.0))
        self._last = int(progress.get("last_bad_step", 0))
        self._what = "a loss or a gradient was not finite"
        self.in_a_row = int(progress.get("bad_steps", 0))

    def state(self) -> dict[str, float]:
        return {
            "good_steps": self._good,
            "mean_loss": self._mean,
            "last_bad_step": self._last,
            "bad_steps": self.in_a_row,
        }

    def add(self, facts: Iterable[StepFacts]) -> list[str]:
        """Count these steps; returns a line for people about each bad one. After trouble nothing counts any more."""
        lines = []
        for fact in facts:
            if self.is_trouble:
                break
            loss = fact.loss_sum / self._global_batch
            if fact.skips > 0:
                self._what = "a loss or a gradient was not finite"
                lines.append(f"step {fact.step}: {self._what}; no rank applied the update")
            elif self._is_spike(loss):
                self._what = f"the loss was more than {self._config.spike_factor:g} times its recent mean"
                lines.append(
                    f"step {fact.step}: the loss {loss:.4g} is far above its recent mean {self._mean:.4g}"
                )
            else:
                self.in_a_row = 0
                self._good = min(self._good + 1, RECENT_STEPS)
                self._mean += (loss - self._mean) / self._good
                continue
            self.in_a_row, self._last = self.in_a_row + 1, fact.step
        return lines

    @property
    def is_trouble(self) -> bool:
        return self.in_a_row >= self._config.after_bad_steps

    def trouble(self, skipped: Skipped, rollbacks: Sequence[Rollback]) -> TroubleError:
        """The error that says so."""
        return TroubleError(self._last - self.in_a_row + 1, self._last, self._what, skipped, rollbacks)

    def _is_spike(self, loss: float) -> bool:
        factor = self._config.spike_factor
        return factor is not None and self._good == RECENT_STEPS and loss > factor * self._mean


def go_back(
    directory: Path, trouble: TroubleError, config: RecoveryConfig, ranks: Ranks, tracker: Tracker | None
) -> None:
    """Make the newest checkpoint before the trouble the one to resume from, and not with the same batches. All ranks.

    tracker: rank 0's, None on the others. The journal hears of it first: its values are then compared with no others.
    Raises `DivergedError` where there is none, or where the run has gone back as often as it may.
    """
    if len(trouble.rollbacks) >= config.max_rollbacks:
        raise DivergedError(
            f"{trouble}. The run went back {len(trouble.rollbacks)} times; recovery.max_rollbacks allows no more.\n"
            "  Lower optim.lr or clip harder (optim.clip_grad_norm), with --allow-change, or raise recovery.max_rollbacks;\n"
            "  the same command then goes on from the last checkpoint."
        )
    found = newest_valid(directory, ranks, before=trouble.first)
    if found is None:
        raise DivergedError(
            f"{trouble}, and there is no checkpoint from before to go back to.\n"
            "  Lower optim.lr, lengthen its warm-up, or save earlier (checkpoint.every_steps)."
        )
    found.close()
    if trouble.rollbacks and trouble.rollbacks[-1]["to_step"] == found.manifest.step:
        with contextlib.suppress(CheckpointError):  # on all ranks: no other one verifies
            found = newest_valid(directory, ranks, before=found.manifest.step) or found
    step = found.manifest.step
    skipped = Skipped.of(found.manifest.data)
    start, stop = skipped.batch(step), trouble.skipped.batch(trouble.last - 1) + 1
    this = {"to_step": step, "batches": [start, stop - 1], "why": str(trouble)}
    rollbacks = [*trouble.rollbacks, this]
    with ranks.together():
        if tracker is not None:
            remove_later(directory, step)
            tracker.go_back(step)
            tracker.tags({"rollbacks": json.dumps(rollbacks)})
            _amend(directory, found.folder, skipped.up_to(stop), rollbacks)
            run_dir.write_status(directory, "running", step, attempt=tracker.attempt, rollbacks=rollbacks)
    log.warning(
        "%s; going back to step %d, without batches %d to %d (rollback %d of %d)",
        trouble, step, start, stop - 1, len(rollbacks), config.max_rollbacks,
    )  # fmt: skip


def _amend(directory: Path, folder: Path, skipped: Skipped, rollbacks: Sequence[Rollback]) -> None:
    """Rank 0: write into a checkpoint's manifest what to pass over. Its slices stay as they are."""
    manifest = layout.read_manifest(folder)
    progress = dict(manifest.progress) | {"rollbacks": rollbacks}
    best = progress.get("best")
    if best and layout.folder_of(directory, int(best["step"])) not in layout.checkpoints(directory):
        progress["best"] = {}  # a later best took its place, and went with the others
    data = dict(manifest.data) | {"skipped": skipped.batches}
    layout.write_manifest(folder, replace(manifest, data=data, progress=progress))
