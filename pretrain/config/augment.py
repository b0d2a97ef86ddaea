"""Settings of what is drawn for each training image."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pretrain.config.section import Positive, Section


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

    @property
    def has_policy(self) -> bool:
        """Whether anything but crop and flip is drawn."""
        given = (self.randaugment_timm, self.randaugment_bv, self.color_jitter, self.random_erasing)
        return self.three_augment or any(section is not None for section in given)

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
