"""The settings of one stage. One section per concern; every module receives only its own.

Every field's description is its documentation: the README's table is generated from this file. Durations carry
their unit in the key (`warmup_steps`, `total_epochs`); sizes are (height, width); rates end in `_rate`.
A key that is not here is an error, a value of another type is an error, and nothing is guessed.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from pretrain.config.data import DataConfig
from pretrain.config.model import ModelConfig
from pretrain.config.section import NonNegative, Positive, Section, one_of

DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]
MOST_PROFILED = 100
_MIRROR = re.compile(
    r"(?!.*(?:^|/)\.\.(?:/|$))"
    r"(?:(?:s3|gs)://[A-Za-z0-9][A-Za-z0-9._-]*[A-Za-z0-9](?:/[\w.~+=,@!() -]+)+|(?:file://)?/?[\w.~+=,@!() -]+(?:/[\w.~+=,@!() -]+)*)/?"
)
ResizeKernel = Literal["bicubic_antialias", "bicubic", "bilinear", "align_corners"]


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
        one_of(self, "warmup_steps", "warmup_epochs", "warmup_samples", at_least=0)
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
    figures_every_steps: Positive | None = Field(
        None, description="steps between two sets of figures, besides those of the end; none: none are drawn"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        one_of(self, "total_steps", "total_epochs", "total_samples", at_least=1)
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


class ProfileConfig(Section):
    steps: tuple[Positive, Positive] | None = Field(
        None,
        description="first and last step to profile: a trace for each rank and a split of the step; none: none",
    )

    @model_validator(mode="after")
    def _few(self) -> Self:
        if self.steps is not None and not 0 <= self.steps[1] - self.steps[0] < MOST_PROFILED:
            raise ValueError(
                f"steps {list(self.steps)} must be first and last, at most {MOST_PROFILED} of them: a step's trace is large"
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
    mirror: str | None = Field(
        None,
        description="where checkpoints are copied to beside training, and restored from where the run has none: `s3://` or "
        "`gs://` with bucket and prefix, or a folder; of this run alone; none: nowhere",
    )

    @model_validator(mode="after")
    def _mirror_is_a_place(self) -> Self:
        if self.mirror is not None and not _MIRROR.fullmatch(self.mirror):
            raise ValueError(
                "mirror must be s3://bucket/prefix, gs://bucket/prefix, file:///folder or the path of a folder, without user "
                "name, password, query, variables or `..`; credentials come from the environment (docs/stores.md)"
            )
        return self


class RecoveryConfig(Section):
    after_bad_steps: Positive = Field(
        5,
        description="steps in a row with a loss or gradient that is not finite, after which the run goes back to a checkpoint",
    )
    max_rollbacks: Annotated[int, Field(ge=0, le=8)] = Field(
        2, description="times that a run may go back; after them such steps stop it"
    )
    spike_factor: Annotated[float, Field(gt=1.0)] | None = Field(
        None, description="a loss of more than this times its recent mean is a bad step too; none: no loss is"
    )
    check_replicas_every_steps: Positive | None = Field(
        None,
        description="steps between two comparisons of the weights over all ranks, besides one before each save; none: never",
    )


class InitConfig(Section):
    source: str = Field(
        alias="from",
        description="whose weights to start from: a run directory, a checkpoint folder, or what `pretrain import` wrote",
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
    system_seconds: Annotated[float, Field(gt=0)] | None = Field(
        30.0,
        description="seconds between two looks at processor, memory, disk, network, GPUs of each node; none: no looks",
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
    profile: ProfileConfig = ProfileConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    init: InitConfig | None = None
    tracking: TrackingConfig = TrackingConfig()
