"""The resolved plan: every number that training will use, computed once, before anything is allocated.

`resolve` is a pure function of the config, the world, the data set's facts and the hardware's. Its result is
printed, saved with the run, tracked, and handed to the engine; no 'auto' reaches DeepSpeed.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from pretrain.config.data import TrainSourceConfig
from pretrain.config.schema import Config
from pretrain.errors import ConfigError

MAX_LANES = 256

Precision = Literal["fp32", "bf16", "bf16_autocast"]
"""bf16_autocast: weights stay fp32 and products run in bf16. It stands for ZeRO stage 0 in bf16, where DeepSpeed's
own bf16 optimizer takes a step of its own at construction and so corrects Adam's bias wrongly from then on."""


@dataclass(frozen=True)
class DataFacts:
    """What the plan needs to know of a data set; read from manifests, no sample is opened.

    source_samples: those of each source of a mixture, in the config's order; none where there is no mixture.
    """

    samples: int
    shards: int
    bytes: int
    digest: str
    val_samples: int = 0
    val_digest: str = ""
    source_samples: tuple[int, ...] = ()


@dataclass(frozen=True)
class SourceShare:
    """A source of training samples: `ratio` of every sum of all ratios come from it."""

    name: str
    samples: int
    ratio: int


@dataclass(frozen=True)
class Hardware:
    """What the plan needs to know of the device: its kind, its name, and whether it multiplies bf16."""

    device: Literal["cuda", "cpu"]
    name: str
    has_bf16: bool


@dataclass(frozen=True)
class Plan:
    """See `table` for what each number is. Batches are in rows, lr and weight decay as the optimizer sees them.

    A row is one view of a sample; with `repeats` a batch has that many rows of each. An epoch, as a length, is as many
    rows as there are training samples, so that repeats and mixing leave the compute of a recipe as it is.
    """

    world_size: int
    global_batch: int
    row_unit: int
    smallest_slice: int
    largest_slice: int
    micro_batch: int
    accumulation: int
    lanes: int
    block_samples: int
    window_blocks: int
    repeats: int
    sources: tuple[SourceShare, ...]
    total_steps: int
    warmup_steps: int
    epochs: float
    log_every_steps: int
    eval_every_steps: int
    save_every_steps: int
    save_every_minutes: float | Literal["auto"] | None
    lr: float
    min_lr: float
    schedule: str
    optimizer: str
    weight_decay: float
    clip_grad_norm: float | None
    zero_stage: int
    precision: Precision
    precision_reason: str
    checkpoint_every_blocks: int
    device: str
    device_name: str
    img_size: tuple[int, int]
    grid: tuple[int, int]
    num_tokens: int
    train_samples: int
    train_shards: int
    train_digest: str
    val_samples: int
    val_digest: str

    def slice_of(self, rank: int) -> tuple[int, int]:
        """First and past-the-last row of the global batch that `rank` computes."""
        return slice_bounds(self.global_batch, rank, self.world_size, self.row_unit)

    @property
    def distinct_samples(self) -> int:
        """Samples of one global batch."""
        return self.global_batch // self.repeats

    @property
    def loss_scale(self) -> float:
        """What the sum of a micro-batch's losses is multiplied with before backward.

        The engine adds up micro-steps and averages over ranks; slices may be uneven. With this factor the gradient
        is that of the mean loss over the global batch, whatever the slices.
        """
        return self.world_size / self.global_batch

    def as_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    def table(self) -> list[tuple[str, str]]:
        """Rows of (what, value) for people."""
        slices = (
            f"{self.largest_slice}"
            if self.smallest_slice == self.largest_slice
            else f"{self.smallest_slice} to {self.largest_slice} (uneven; losses are weighted)"
        )
        slices += ", in pairs that mix" if self.row_unit == 2 else ""
        clip = "off" if self.clip_grad_norm is None else f"{self.clip_grad_norm:g}"
        blocks = {0: "off", 1: "every block"}.get(
            self.checkpoint_every_blocks, f"every {self.checkpoint_every_blocks} blocks"
        )
        validation = f"{self.val_samples:,} samples, every {self.eval_every_steps:,} steps and at the end"
        return [
            ("device", f"{self.world_size} x {self.device_name}"),
            (
                "training data",
                f"{self.train_samples:,} samples in {self.train_shards:,} shards, {self.train_digest[:12]}",
            ),
            ("validation", validation if self.val_samples else "none"),
            (
                "image, grid, tokens",
                f"{_by(self.img_size)} px, {_by(self.grid)} patches, {self.num_tokens} tokens",
            ),
            *self._sources_row(),
            ("global batch", f"{self.global_batch:,} samples" + self._repeated()),
            ("per rank", slices),
            ("micro-batch x accumulation", f"{self.micro_batch} x {self.accumulation}"),
            (
                "sample order",
                f"{self.lanes} lanes, blocks of {self.block_samples:,} samples, windows of {self.window_blocks}",
            ),
            ("length", f"{self.total_steps:,} steps = {self.epochs:.2f} epochs"),
            (
                "learning rate",
                f"{self.warmup_steps:,} steps to {self.lr:g}, then {self.schedule} to {self.min_lr:g}",
            ),
            (
                "optimizer",
                f"{self.optimizer}, weight decay {self.weight_decay:g}, gradient norm clipped at {clip}",
            ),
            ("precision", f"{self.precision} ({self.precision_reason})"),
            ("ZeRO stage", str(self.zero_stage)),
            ("activation checkpointing", blocks),
            ("checkpoints", f"every {self.save_every_steps:,} steps{self._by_the_clock()} and at the end"),
        ]

    def _by_the_clock(self) -> str:
        if self.save_every_minutes is None:
            return ""
        if self.save_every_minutes == "auto":
            return ", as often as loses least time,"
        return f", every {self.save_every_minutes:g} minutes"

    def _repeated(self) -> str:
        if self.repeats == 1:
            return ""
        return f": {self.distinct_samples:,}, each {self.repeats} times with draws of its own"

    def _sources_row(self) -> list[tuple[str, str]]:
        """Where a sample is not simply seen once an epoch: how often each source is passed over."""
        if len(self.sources) == 1 and self.repeats == 1:
            return []
        drawn, parts = self.total_steps * self.distinct_samples, sum(s.ratio for s in self.sources)
        lines = [
            f"{s.name} {s.ratio / parts:.1%}: {s.samples:,} samples, {drawn * s.ratio / parts / s.samples:.2f} passes"
            for s in self.sources
        ]
        return [("sources", "\n".join(lines))]


def resolve(config: Config, world_size: int, data: DataFacts, hardware: Hardware) -> Plan:
    """Compute the plan; raises `ConfigError` where the settings cannot be met."""
    batch = config.train.global_batch
    repeats = config.data.augment.repeats
    if batch % repeats:
        raise ConfigError(
            f"data.augment.repeats {repeats} does not divide train.global_batch {batch}: every sample of a batch has "
            f"{repeats} rows. Use a multiple of {repeats} as the batch."
        )
    unit = _row_unit(config, world_size)
    smallest, largest = unit * (batch // unit // world_size), unit * -(-batch // unit // world_size)
    micro_batch, accumulation = _micro_batch(config.train.micro_batch or largest, largest, unit)
    total_steps = _steps(
        config.train.total_steps, config.train.total_epochs, config.train.total_samples, batch, data.samples
    )
    optim = config.optim
    warmup_steps = (
        _steps(optim.warmup_steps, optim.warmup_epochs, optim.warmup_samples, batch, data.samples) or 0
    )
    if warmup_steps > total_steps:
        raise ConfigError(
            f"the warm-up of {warmup_steps} steps is longer than the training of {total_steps} steps"
        )
    model = config.model
    return Plan(
        world_size=world_size,
        global_batch=batch,
        row_unit=unit,
        smallest_slice=smallest,
        largest_slice=largest,
        micro_batch=micro_batch,
        accumulation=accumulation,
        lanes=_lanes(config.data.lanes, batch, repeats),
        block_samples=max(1, round(config.data.block_mib * 2**20 * data.samples / max(1, data.bytes))),
        window_blocks=config.data.window_blocks,
        repeats=repeats,
        sources=_sources(config.data.train, data),
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        epochs=total_steps * batch / data.samples,
        log_every_steps=config.train.log_every_steps,
        eval_every_steps=config.train.eval_every_steps or total_steps,
        save_every_steps=config.checkpoint.every_steps or total_steps,
        save_every_minutes=config.checkpoint.every_minutes,
        lr=optim.lr,
        min_lr=optim.min_lr,
        schedule=optim.schedule,
        optimizer=optim.name,
        weight_decay=optim.weight_decay,
        clip_grad_norm=optim.clip_grad_norm,
        zero_stage=config.engine.zero_stage,
        precision=_precision(config, hardware),
        precision_reason=_why_precision(config, hardware),
        checkpoint_every_blocks=config.engine.checkpoint_every_blocks,
        device=hardware.device,
        device_name=hardware.name,
        img_size=model.img_size,
        grid=model.grid,
        num_tokens=model.num_tokens,
        train_samples=data.samples,
        train_shards=data.shards,
        train_digest=data.digest,
        val_samples=data.val_samples,
        val_digest=data.val_digest,
    )


def slice_bounds(batch: int, rank: int, world_size: int, unit: int = 1) -> tuple[int, int]:
    """Rows [start, stop) of a global batch that belong to `rank`; lengths differ by at most `unit`.

    unit: adjacent rows that stay together; it divides the batch.
    """
    units = batch // unit
    return unit * (rank * units // world_size), unit * ((rank + 1) * units // world_size)


def _row_unit(config: Config, world_size: int) -> int:
    """Adjacent rows that no slice and no micro-batch may part: 2 where pairs are mixed, else 1."""
    batch, micro = config.train.global_batch, config.train.micro_batch
    if not config.objective.mixes:
        if batch < world_size:
            raise ConfigError(
                f"train.global_batch {batch} is smaller than the world of {world_size} ranks: some would have no sample. "
                f"Use at least {world_size}, or fewer ranks."
            )
        return 1
    if batch % 2 or batch < 2 * world_size or micro == 1:
        given = f"train.global_batch {batch}" if micro != 1 else "train.micro_batch 1"
        raise ConfigError(
            f"{given} cannot be cut into pairs for {world_size} ranks; mixup and CutMix mix pairs of samples. Use an even "
            f"train.global_batch of at least {2 * world_size} and a micro-batch of at least 2, or set "
            "objective.mixup_alpha and objective.cutmix_alpha to 0."
        )
    return 2


def _micro_batch(most: int, largest: int, unit: int) -> tuple[int, int]:
    """(micro-batch, accumulation) that hold a slice of `largest` rows in micro-batches of at most `most`, both in units."""
    units = largest // unit
    accumulation = -(-units // (most // unit))
    return unit * -(-units // accumulation), accumulation


def _steps(steps: int | None, epochs: float | None, samples: int | None, batch: int, dataset: int) -> int:
    """A duration in any of its units as steps; part of a step counts as one."""
    if steps is not None:
        return steps
    wanted = samples if samples is not None else (epochs or 0.0) * dataset
    return int(-(-wanted // batch))


def _lanes(given: int | None, batch: int, repeats: int) -> int:
    distinct = batch // repeats
    if given is None:
        return max(n for n in range(1, min(distinct, MAX_LANES) + 1) if distinct % n == 0)
    if distinct % given:
        parts = f"{batch}" if repeats == 1 else f"{batch} / data.augment.repeats {repeats}"
        raise ConfigError(
            f"data.lanes {given} does not divide train.global_batch {parts}; use a divisor, or leave it out"
        )
    return given


def _sources(train: TrainSourceConfig, data: DataFacts) -> tuple[SourceShare, ...]:
    samples = data.source_samples or (data.samples,)
    return tuple(SourceShare(*facts) for facts in zip(train.names, samples, train.ratios, strict=True))


def _precision(config: Config, hardware: Hardware) -> Precision:
    wanted = config.engine.precision
    if wanted == "fp32" or (wanted == "auto" and not hardware.has_bf16):
        return "fp32"
    return "bf16_autocast" if config.engine.zero_stage == 0 else "bf16"


def _why_precision(config: Config, hardware: Hardware) -> str:
    wanted, stage_0 = config.engine.precision, config.engine.zero_stage == 0
    if wanted != "auto":
        return "fp32 weights, products in bf16: ZeRO stage 0" if stage_0 and wanted == "bf16" else "as set"
    return f"auto: this hardware {'multiplies' if hardware.has_bf16 else 'does not multiply'} bf16"


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
