"""One attempt at one stage, put together: data, plan, engine, first weights, tracking, loop, conclusion."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain import account, run_dir
from pretrain.checkpoint import mirror as mirrors
from pretrain.checkpoint.layout import config_of
from pretrain.checkpoint.load import Slices, WeightsFile, newest_valid, open_weights_together
from pretrain.config import Config, InitConfig, Plan, resolve
from pretrain.config.resume import adapted, changed_keys, changed_numbers
from pretrain.data import Dataset, check_labels, facts, open_dataset, open_training
from pretrain.data.loader import EvalLoader, TrainLoader
from pretrain.data.quarantine import Quarantine
from pretrain.data.skipped import Skipped
from pretrain.data.state import check_continues, data_state
from pretrain.distributed import Ranks
from pretrain.engine import Engine
from pretrain.errors import CheckpointError, ConfigError
from pretrain.figures.during import NUM_IMAGES, RunFigures
from pretrain.formats.files import is_export
from pretrain.formats.native import ExportedWeights, open_export_together
from pretrain.hardware import detect
from pretrain.images import validation_images
from pretrain.logs import log
from pretrain.metrics import Meter, peak_flops
from pretrain.model import InitialWeights, forward_flops
from pretrain.recovery import TroubleError, go_back
from pretrain.stop import StopFlag
from pretrain.tracking import SystemMetrics, Tracker
from pretrain.tracking.journal import journal_path, restored_path
from pretrain.tracking.records import Status
from pretrain.tracking.system import node_of
from pretrain.trainer import Outcome, Start, Trainer
from pretrain.transfer import Transfer, transfer
from pretrain.watchdog import Watchdog

TRAIN_FLOPS_FACTOR = 3
"""A training step's matrix products as a multiple of the forward pass's: one forward, two backward."""


MIRROR_SECONDS = {"finished": 600.0, "interrupted": 5.0}
"""How long the end of a run waits for its mirror; who was asked to stop has little time."""


@dataclass(frozen=True)
class Data:
    train: Dataset
    val: Dataset | None


@dataclass(frozen=True)
class _HandOff:
    source: WeightsFile | ExportedWeights
    transfer: Transfer


def run_stage(
    config: Config,
    ranks: Ranks,
    directory: Path,
    log_file: Path,
    stop: StopFlag,
    afterwards: ExitStack,
    allow_change: Sequence[str] = (),
) -> Outcome:
    """Start or resume the stage in `directory` and train it to its end or to a stop. All ranks.

    afterwards: what rank 0 leaves to do once no other rank waits for it: the rest of the delivery to MLflow.
    allow_change: keys of the config that the user says may differ from those that the run was trained with.
    """
    timeout = config.engine.timeout_seconds
    with ExitStack() as stack, Watchdog(directory, log_file, timeout, is_main=ranks.is_main) as watchdog:
        data = _open_data(config, ranks)
        with ranks.together():
            plan = resolve(config, ranks.size, facts(data.train, data.val), detect())
        agree(plan, ranks)
        found = _newest(config, directory, ranks)
        start = Start()
        if found is not None:
            start = _start_at(found, config, plan, data.train, allow_change)
        tracker = None
        with ranks.together():
            if ranks.is_main:
                tracker = account.start_tracking(config, plan, data.train, data.val, start, directory)
                stack.push(lambda kind, *_: account.fail(directory, tracker, afterwards) if kind else None)
                run_dir.write_config(directory, config, plan)
                run_dir.write_status(directory, "running", start.step, attempt=tracker.attempt)
                account.announce(plan, config, start)
        if config.tracking.system_seconds is not None:
            _look_at_nodes(stack, config.tracking.system_seconds, ranks, directory, tracker)
        handed = None
        if found is None and config.init is not None:
            handed = _hand_off(config, config.init, ranks)
        engine = Engine(config, plan, ranks, log_file)
        if found is not None:
            _restore(engine, found)
        elif handed is not None:
            _write_heirs(engine, handed, ranks, directory, tracker)
        else:
            engine.write(InitialWeights(config.model, config.run.seed))
        mirror = mirrors.opened(directory, config.checkpoint, ranks, journal_path(directory))
        outcome = None
        with ExitStack() as loaders:
            # They stay while the run goes back: another run may wait for their room in a node's cache.
            attempt = _Attempt(
                config, plan, ranks, data, engine, directory, stop, tracker, allow_change, watchdog, mirror,
                *_open_loaders(loaders, config, plan, ranks, data),
            )  # fmt: skip
            while outcome is None:
                try:
                    outcome = attempt.train(start)
                except TroubleError as trouble:
                    start = attempt.go_back(trouble)
        with ranks.together():
            if tracker is not None:
                account.conclude(outcome, directory, tracker)
                status: Status = "FINISHED" if outcome.status == "finished" else "KILLED"
                if mirror is not None:
                    afterwards.callback(mirror.close, MIRROR_SECONDS[outcome.status])
                afterwards.callback(account.finish, tracker, status)
    return outcome


@dataclass(frozen=True)
class _Attempt:
    """What one attempt trains with, however often it goes back. All ranks; `tracker` is rank 0's alone."""

    config: Config
    plan: Plan
    ranks: Ranks
    data: Data
    engine: Engine
    directory: Path
    stop: StopFlag
    tracker: Tracker | None
    allow_change: Sequence[str]
    watchdog: Watchdog
    mirror: mirrors.Mirror | None
    batches: TrainLoader
    validation: EvalLoader | None

    def train(self, start: Start) -> Outcome:
        """Train from `start` on; raises `TroubleError` where the run has to go back."""
        config, plan, ranks, seed = self.config, self.plan, self.ranks, self.config.run.seed
        figures = None
        if config.train.figures_every_steps is not None and self.validation is not None:
            images = _first_images(config, ranks)
            figures = RunFigures(self.engine, ranks, images, self.directory, self.tracker)
        return Trainer(
            config=config,
            plan=plan,
            ranks=ranks,
            engine=self.engine,
            batches=self.batches,
            validation=None if self.validation is None else self.validation.__iter__,
            figures=figures,
            quarantine=Quarantine(self.directory, ranks.rank, config.data.max_bad_share),
            meter=_meter(config, plan, ranks, start),
            run_dir=self.directory,
            data_state=lambda step, skipped: data_state(step, plan, seed, skipped),
            stop=self.stop,
            start=start,
            tracker=self.tracker,
            watchdog=self.watchdog,
            mirror=self.mirror,
        ).run()

    def go_back(self, trouble: TroubleError) -> Start:
        """Take the engine back to a checkpoint from before the trouble, in this process."""
        go_back(self.directory, trouble, self.config.recovery, self.ranks, self.tracker)
        found = newest_valid(self.directory, self.ranks)
        assert found is not None, "a checkpoint was there to go back to"
        if self.mirror is not None:
            self.mirror.go_back(found.manifest.step)
        start = _start_at(found, self.config, self.plan, self.data.train, self.allow_change)
        _restore(self.engine, found)
        return start


def _open_data(config: Config, ranks: Ranks) -> Data:
    """What rank 0 finds, on all ranks: one process reads the manifests and looks at every shard, not thousands."""
    opened = None
    with ranks.together():
        if ranks.is_main:
            opened = _open_here(config)
    return ranks.broadcast(opened)


def _open_loaders(
    stack: ExitStack, config: Config, plan: Plan, ranks: Ranks, data: Data
) -> tuple[TrainLoader, EvalLoader | None]:
    """This rank's batches; `stack` closes them. All ranks: the disk of one node may have no room for its cache."""
    with ranks.together():
        batches = stack.enter_context(
            TrainLoader(data.train, config.data, config.model, plan, seed=config.run.seed, rank=ranks.rank)
        )
        if data.val is None:
            return batches, None
        loader = EvalLoader(data.val, config.data, config.model, plan, rank=ranks.rank)
        return batches, stack.enter_context(loader)


def _open_here(config: Config) -> Data:
    """Open the data sets from their manifests and see that the labels fit the model."""
    seconds = config.data.read_timeout_seconds
    train = open_training(config.data.train, seconds)
    check_labels(train, config.data, config.model.num_classes)
    val = None if config.data.val is None else open_dataset(config.data.val.shards, seconds)
    if val is not None:
        val.require_classes(config.model.num_classes)
    return Data(train, val)


def _newest(config: Config, directory: Path, ranks: Ranks) -> Slices | None:
    """The newest checkpoint here that verifies or, where there is none, the mirror's. All ranks."""
    url = config.checkpoint.mirror
    try:
        found = newest_valid(directory, ranks)
    except CheckpointError as error:  # on all ranks
        if url is None:
            raise
        log.warning("%s", error)
        found = None
    if found is None and url is not None and mirrors.restore(directory, url, ranks, restored_path(directory)):
        return newest_valid(directory, ranks)
    return found


def agree(plan: Plan, ranks: Ranks) -> None:
    """See that all ranks resolved the same plan: hardware, or what they see of the data, may differ between nodes."""
    main: dict[str, Any] = ranks.broadcast(plan.as_dict())
    differing = [f"{k}: {main[k]} on rank 0, {v} here" for k, v in plan.as_dict().items() if main[k] != v]
    with ranks.together():
        if differing:
            raise ConfigError(
                f"rank {ranks.rank} resolved another plan than rank 0:\n  " + "\n  ".join(differing) + "\n"
                "Use nodes of one kind that see the same shards, or set what differs in the config."
            )


def _start_at(
    found: Slices, config: Config, plan: Plan, train: Dataset, allow_change: Sequence[str]
) -> Start:
    """Where the checkpoint left off; refuses to go on with other data, settings or precision."""
    check_continues(found.manifest.data, plan, config.run.seed, train, str(found.folder))
    run = found.folder.parents[1]
    run_dir.refuse_changes(run, changed_keys(config_of(found.manifest, found.folder), config), allow_change)
    run_dir.refuse_changes(run, changed_numbers(found.manifest.plan, plan), allow_change)
    changes = adapted(found.manifest.plan, plan)
    log.info(
        "resuming at step %d from %s%s",
        found.manifest.step,
        found.folder,
        f" with {', '.join(changes)}" if changes else "",
    )
    progress = dict(found.manifest.progress)
    if found.manifest.plan["val_digest"] != plan.val_digest and progress.pop("best", None):
        log.info("another validation set: the best score so far does not count on it")
    return Start(found.manifest.step, progress, Skipped.of(found.manifest.data))


def _hand_off(config: Config, init: InitConfig, ranks: Ranks) -> _HandOff:
    """The first weights of this stage, made of those that `init.from` names. All ranks."""
    path = Path(init.source)
    if ranks.broadcast(is_export(path) if ranks.is_main else None):
        source: WeightsFile | ExportedWeights = open_export_together(path, ranks)
    else:
        source = open_weights_together(path, init.which, ranks)
    with ranks.together():
        made = transfer(source.weights, source.model, config.model, init, config.run.seed)
    return _HandOff(source, made)


def _restore(engine: Engine, found: Slices) -> None:
    """Put a checkpoint into the engine. All ranks."""
    engine.restore(found.read, found.manifest.optimizer_steps)
    found.close()


def _write_heirs(
    engine: Engine, handed: _HandOff, ranks: Ranks, directory: Path, tracker: Tracker | None
) -> None:
    """Put the weights of a hand-off into the engine, and say what they were made of. All ranks."""
    engine.write(handed.transfer.weights)
    handed.source.close()
    with ranks.together():
        if tracker is not None:
            account.show_hand_off(handed.source, handed.transfer, directory, tracker)


def _first_images(config: Config, ranks: Ranks) -> Tensor:
    """The first validation images, the same on all ranks: what the figures show to the model."""
    images = None
    with ranks.together():
        if ranks.is_main:
            images = validation_images(config, NUM_IMAGES)
    return ranks.broadcast(images)


def _meter(config: Config, plan: Plan, ranks: Ranks, start: Start) -> Meter:
    flops = TRAIN_FLOPS_FACTOR * forward_flops(config.model)
    return Meter(
        plan, flops, peak_flops(ranks.device, plan.precision, plan.device_name), start.progress or {}
    )


def _look_at_nodes(
    stack: ExitStack, every_seconds: float, ranks: Ranks, directory: Path, tracker: Tracker | None
) -> None:
    """Have one rank of each node log how busy it is, until the stack unwinds. All ranks."""
    hosts: list[str] = ranks.gather(run_dir.node())
    node, num_nodes = node_of(ranks.rank, hosts), len(set(hosts))
    if tracker is not None:
        tracker.tags({"nodes": " ".join(dict.fromkeys(hosts))})
    if node is not None:
        stack.enter_context(SystemMetrics(directory, node, num_nodes, every_seconds, tracker))
