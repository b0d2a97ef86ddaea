"""The settings of one stage. One section per concern; every module receives only its own.

Every field's description is its documentation: the README's table is generated from this file. Durations carry
their unit in the key (`warmup_steps`, `total_epochs`); sizes are (height, width); rates end in `_rate`.
A key that is not here is an error, a value of another type is an error, and nothing is guessed.
"""

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from pretrain.config.model import ModelConfig
from pretrain.config.ratios import whole_ratios
from pretrain.config.section import NonNegative, Positive, Section

DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]
ResizeKernel = Literal["bicubic_antialias", "bicubic", "bilinear", "align_corners"]


MAX_SOURCES = 16


class RunConfig(Section):
    dir: str = Field(
        description="run directory: logs, journal, checkpoints, plan; starting again here resumes"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="seed of the weights, the sample order and every augmentation draw"
    )
    campaign: str | None = Field(
        None, description="name of the MLflow parent run that holds the stages of one model; none: no parent"
    )


class SourceConfig(Section):
    shards: str = Field(
        description="folder of shards with their manifest, or a brace pattern such as `dir/a-{000..099}.tar`; "
        "a path, or a URL (http, https, s3, gs)"
    )


class MixedSourceConfig(Section):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        max_length=20,
        description="name of a source in tables and metrics",
    )
    shards: str = Field(description="its folder of shards with their manifest, or a brace pattern")
    weight: Annotated[float, Field(gt=0)] = Field(
        description="its part of all training samples, relative to the other sources'"
    )


class TrainSourceConfig(Section):
    shards: str | None = Field(
        None,
        description="folder of shards with their manifest, or a brace pattern such as `dir/a-{000..099}.tar`; "
        "this or `mix`",
    )
    mix: tuple[MixedSourceConfig, ...] | None = Field(
        None, description="2 to 16 sources, mixed by weight; they must mean the same by a label"
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        _one_of(self, "shards", "mix", at_least=1)
        if self.mix is not None and not 2 <= len(self.mix) <= MAX_SOURCES:
            raise ValueError(f"mix is a list of 2 to {MAX_SOURCES} sources; given: {len(self.mix)}")
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            raise ValueError(f"two sources of mix are named {twice[0]}; give each a name of its own")
        whole_ratios([source.weight for source in self.mix or ()] or [1])
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The sources in their order; `train` where there is only one."""
        return tuple(source.name for source in self.mix) if self.mix else ("train",)

    @property
    def ratios(self) -> tuple[int, ...]:
        """The sources' parts as whole numbers."""
        return whole_ratios([source.weight for source in self.mix]) if self.mix else (1,)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The shards of each source."""
        return tuple(source.shards for source in self.mix) if self.mix else (self.shards or "",)


class TimmRandAugmentConfig(Section):
    """RandAugment as timm has it; the defaults are its `rand-m9-n2-mstd0.5-inc1`."""

    magnitude: Annotated[float, Field(ge=0.0, le=10.0)] = Field(9.0, description="mean magnitude, timm's `m`")
    num_ops: Positive = Field(2, description="operations drawn for an image, timm's `n`")
    magnitude_std: Annotated[float, Field(ge=0.0)] = Field(
        0.5, description="standard deviation of the magnitude, drawn for each operation; timm's `mstd`"
    )
    increasing: bool = Field(
        True, description="every operation is stronger at a higher magnitude; timm's `inc`"
    )
    prob: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.5, description="probability that a drawn operation is applied, timm's `p`"
    )


class BigVisionRandAugmentConfig(Section):
    """RandAugment as big_vision has it, `randaug(num_ops, magnitude)`."""

    magnitude: Annotated[float, Field(ge=0.0, le=20.0)] = Field(
        10.0, description="magnitude of every operation; published recipes use 0 to 20"
    )
    num_ops: Positive = Field(2, description="operations drawn for an image, each applied")


class ColorJitterConfig(Section):
    """torchvision's `ColorJitter`."""

    brightness: Annotated[float, Field(ge=0.0)] = Field(0.0, description="factor from 1 - this to 1 + this")
    contrast: Annotated[float, Field(ge=0.0)] = Field(0.0, description="factor from 1 - this to 1 + this")
    saturation: Annotated[float, Field(ge=0.0)] = Field(0.0, description="factor from 1 - this to 1 + this")
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = Field(
        0.0, description="turn by up to this share of a full circle, either way"
    )

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            raise ValueError(
                "give one of brightness, contrast, saturation, hue above 0, or leave color_jitter out"
            )
        return self


class RandomErasingConfig(Section):
    """timm's `RandomErasing`, on uint8."""

    prob: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.25, description="probability for an image")
    mode: Literal["const", "pixel"] = Field(
        "pixel", description="fill with the model's mean, or with normal noise of the model's mean and std"
    )
    area: tuple[float, float] = Field(
        (0.02, 1 / 3), description="erased share of the image, over all its boxes"
    )
    ratio: tuple[float, float] = Field((0.3, 1 / 0.3), description="height / width of a box")
    count: Positive = Field(1, description="boxes in an image")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area {list(self.area)} must satisfy 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {list(self.ratio)} must satisfy 0 < low <= high")
        return self


class AugmentConfig(Section):
    crop: Literal["random_resized", "inception", "resize_crop", "resize"] = Field(
        "random_resized",
        description="random area and shape, as torchvision or as TensorFlow draws them; shorter side resized, padded and "
        "cropped (DeiT-3); or only a resize of the whole image",
    )
    scale: tuple[float, float] = Field(
        (0.08, 1.0), description="area of a random crop as a share of the image"
    )
    ratio: tuple[float, float] = Field((0.75, 4 / 3), description="width / height of a random crop")
    hflip: bool = Field(True, description="mirror left and right with probability one half")
    randaugment_timm: TimmRandAugmentConfig | None = Field(
        None, description="RandAugment in timm's semantics"
    )
    randaugment_bv: BigVisionRandAugmentConfig | None = Field(
        None, description="RandAugment in big_vision's semantics"
    )
    three_augment: bool = Field(
        False,
        description="DeiT-3's 3-Augment: greyscale, solarize or blur; it goes with a `color_jitter` of 0.3",
    )
    color_jitter: ColorJitterConfig | None = Field(None, description="random brightness, contrast, ...")
    random_erasing: RandomErasingConfig | None = Field(
        None, description="boxes of an image blotted out, last of all"
    )

    repeats: Annotated[int, Field(ge=1, le=255)] = Field(
        1,
        description="rows of a batch that a sample has, each with its own draws; must divide the global batch",
    )

    @model_validator(mode="after")
    def _one_policy(self) -> Self:
        given = [n for n in ("randaugment_timm", "randaugment_bv", "three_augment") if getattr(self, n)]
        if len(given) > 1:
            raise ValueError(
                f"give at most one of randaugment_timm, randaugment_bv, three_augment; given: {', '.join(given)}"
            )
        return self

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {list(self.scale)} must satisfy 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {list(self.ratio)} must satisfy 0 < low <= high")
        return self


class DataConfig(Section):
    train: TrainSourceConfig = Field(description="what to train on")
    val: SourceConfig | None = Field(None, description="what to evaluate on; none: no evaluation")
    augment: AugmentConfig = Field(AugmentConfig(), description="what is drawn for each training image")
    val_crop: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0,
        description="evaluation: share of the resized image's side that the centre crop keeps (0.875 is common)",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="antialiased resize of images"
    )
    decode_threads: NonNegative | Literal["auto"] = Field(
        "auto",
        description="threads that decode beside the training step; auto: the rank's share of the job's cores; 0: none",
    )
    workers: Literal["threads", "processes"] = Field(
        "threads",
        description="where those threads run: beside the training loop, or in one process of their own for each rank",
    )
    prefetch_steps: Positive = Field(2, description="steps that are decoded ahead")
    max_pixels: Positive = Field(89_478_485, description="an image whose header says more is refused unread")
    max_bad_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        1e-4,
        description="share of the training samples that may be bad and are replaced (10 may in any case); 0: none may",
    )
    lanes: Annotated[int, Field(ge=1, lt=2**20)] | None = Field(
        None,
        description="canonical lanes of the sample order; must divide the global batch / repeats; none: chosen",
    )
    block_mib: Annotated[float, Field(gt=0)] = Field(
        8.0, description="bytes read at once, in MiB: one I/O block"
    )
    window_blocks: Positive = Field(4, description="blocks whose samples are shuffled among each other")
    read_ahead_mib: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="remote shards: MiB of coming blocks that each rank fetches ahead; none: as many as it is in",
    )
    block_memory_mib: Annotated[float, Field(gt=0)] = Field(
        4096.0,
        description="remote shards without a cache: most MiB of blocks in the memory of each rank",
    )
    cache_dir: str | None = Field(
        None, description="remote shards: folder on a disk of each node that its ranks keep blocks in"
    )
    cache_gib: Annotated[float, Field(gt=0)] | None = Field(
        None, description="most GiB in `cache_dir`; what was not used for longest makes room"
    )
    read_timeout_seconds: Annotated[float, Field(gt=0)] = Field(
        120.0, description="remote shards: time for one read, retries included, after which the run stops"
    )

    @model_validator(mode="after")
    def _cache_whole(self) -> Self:
        if (self.cache_dir is None) != (self.cache_gib is None):
            raise ValueError("give cache_dir and cache_gib together: where the cache lies, and its bound")
        return self


def for_evaluation(data: DataConfig) -> DataConfig:
    """How a run reads images, without what decides about its own training samples: sources, lanes, augmentation."""
    one_source = TrainSourceConfig(shards="")
    return data.model_copy(update={"train": one_source, "lanes": None, "augment": AugmentConfig()})


class ObjectiveConfig(Section):
    name: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="cross-entropy, or one binary loss a class"
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="share of the target that is spread over all classes"
    )
    mixup_alpha: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="mixup of pairs of images, their shares from Beta(this, this); 0: none"
    )
    cutmix_alpha: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="CutMix of pairs, the area left from Beta(this, this); 0: none"
    )
    mix_prob: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="probability that a pair is mixed at all"
    )
    mix_switch_prob: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.5, description="with both: probability that a mixed pair is CutMix's rather than mixup's"
    )

    @property
    def mixes(self) -> bool:
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


class OptimConfig(Section):
    name: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with momentum")
    lr: Annotated[float, Field(gt=0)] = Field(description="peak learning rate")
    betas: tuple[DecayRate, DecayRate] = Field((0.9, 0.999), description="AdamW's decay rates of the moments")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's epsilon")
    momentum: DecayRate = Field(0.9, description="SGD's momentum")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.05,
        description="as torch's AdamW and SGD see it (times lr at each step); never on biases, norms, cls, PE",
    )
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="lr of a layer is lr times this to the power of its distance from the head"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="lr from its peak to `min_lr`"
    )
    min_lr: Annotated[float, Field(ge=0)] = Field(0.0, description="learning rate at the last step")
    warmup_steps: NonNegative | None = Field(
        None, description="steps from 0 to the peak; this or one of the next two"
    )
    warmup_epochs: Annotated[float, Field(ge=0)] | None = Field(None, description="the same in epochs")
    warmup_samples: NonNegative | None = Field(None, description="the same in samples")
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="largest norm of the gradient of a global batch; none: not clipped"
    )

    @model_validator(mode="after")
    def _at_most_one(self) -> Self:
        _one_of(self, "warmup_steps", "warmup_epochs", "warmup_samples", at_least=0)
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


class TrainConfig(Section):
    global_batch: Positive = Field(description="samples of one optimizer step, over all ranks")
    micro_batch: Positive | None = Field(
        None,
        description="most samples of one forward on one rank; the rest is accumulated; none: no accumulation",
    )
    total_steps: Positive | None = Field(None, description="length of the stage; this or one of the next two")
    total_epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="the same in epochs")
    total_samples: Positive | None = Field(None, description="the same in samples")
    log_every_steps: Positive = Field(10, description="steps between two records of loss, lr, speed")
    eval_every_steps: Positive | None = Field(
        None, description="steps between two evaluations; none: only at the end (where there is `data.val`)"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        _one_of(self, "total_steps", "total_epochs", "total_samples", at_least=1)
        return self


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="what DeepSpeed ZeRO shards: nothing, optimizer, +gradients, +weights"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "bf16", description="auto: bf16 where the hardware multiplies it (sm80, AVX512-BF16, AMX), else fp32"
    )
    checkpoint_every_blocks: NonNegative = Field(
        0, description="activation checkpointing: 0 none, 1 every block is recomputed, k every k-th"
    )
    timeout_seconds: Annotated[int, Field(ge=5)] = Field(
        600, description="a collective that takes longer means a hung rank: the run stops"
    )
    deterministic: bool = Field(False, description="bit-identical repeats on CUDA too, at the cost of speed")
    compile: bool = Field(
        False,
        description="torch.compile each block; ZeRO stages 0 to 2; needs a C++ compiler, minutes at the start",
    )

    @model_validator(mode="after")
    def _compilable(self) -> Self:
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile needs zero_stage 0, 1 or 2: at stage 3 weights come and go inside a block"
            )
        return self


class CheckpointConfig(Section):
    every_steps: Positive | None = Field(
        None, description="steps between two checkpoints; none: by the clock, or only at the end"
    )
    every_minutes: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        None,
        description="minutes between two checkpoints, besides `every_steps`; auto: what loses least time, by Young's rule",
    )
    failures_per_day: Annotated[float, Field(gt=0)] = Field(
        1.0, description="of the whole job, preemptions too: what `every_minutes: auto` reckons with"
    )
    background: bool = Field(
        True,
        description="write checkpoints beside training, from a copy in host memory as large as a rank's own slices",
    )
    keep: Annotated[int, Field(ge=1)] = Field(2, description="newest checkpoints to keep, the best one aside")
    keep_best: bool = Field(True, description="also keep the best by validation top-1")


class InitConfig(Section):
    source: str = Field(
        alias="from", description="run directory or checkpoint folder whose weights to start from"
    )
    position: Literal["resize", "reset", "drop"] = Field(
        "resize",
        description="learned position embedding: take over and interpolate on a new grid, draw anew, or set to zero",
    )
    patch: Literal["keep", "resize"] = Field(
        "keep",
        description="patch filters of another model.patch_size: refuse, or resize by pseudo-inverse (FlexiViT)",
    )
    resize_kernel: ResizeKernel = Field(
        "bicubic_antialias", description="kernel of the interpolation of positions and patch filters"
    )
    which: Literal["best", "last"] = Field("last", description="which checkpoint of a run")
    head: Literal["auto", "keep", "zero"] = Field(
        "auto",
        description="auto: keep the head where the classes agree, else a new one of zeros (paper table 4)",
    )

    model_config = ConfigDict(validate_by_alias=True, validate_by_name=True, serialize_by_alias=True)


class TrackingConfig(Section):
    uri: str | None = Field(
        "sqlite:///runs/mlflow.db",
        description="MLflow tracking URI, without credentials; none: only the journal",
    )
    experiment: str = Field("pretrain", min_length=1, description="MLflow experiment")
    run_name: str | None = Field(
        None, description="name of the run; none: the run directory's last two parts"
    )


class Config(Section):
    """One stage: one YAML, one run directory, one MLflow run."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    init: InitConfig | None = None
    tracking: TrackingConfig = TrackingConfig()


def _one_of(section: Section, *names: str, at_least: int) -> None:
    given = [n for n in names if getattr(section, n) is not None]
    if not at_least <= len(given) <= 1:
        raise ValueError(
            f"give {'exactly' if at_least else 'at most'} one of {', '.join(names)}; given: "
            f"{', '.join(given) or 'none'}"
        )
