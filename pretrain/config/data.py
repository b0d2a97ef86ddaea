"""Settings of the data: where the samples lie, how they are ordered, read and decoded."""

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pretrain.config.augment import AugmentConfig
from pretrain.config.ratios import whole_ratios
from pretrain.config.section import NonNegative, Positive, Section, one_of

MAX_SOURCES = 16


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
        one_of(self, "shards", "mix", at_least=1)
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
        description="where those threads run: beside the training loop, or in processes of their own: one for each 8 threads, "
        "or for each thread where `augment` has a policy, colour jitter or random erasing",
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

    def without_cache(self) -> Self:
        """The same for a reader of a few samples: the cache's room is for those that read all the time."""
        return self.model_copy(update={"cache_dir": None, "cache_gib": None, "read_ahead_mib": None})

    @model_validator(mode="after")
    def _cache_whole(self) -> Self:
        if (self.cache_dir is None) != (self.cache_gib is None):
            raise ValueError("give cache_dir and cache_gib together: where the cache lies, and its bound")
        return self
