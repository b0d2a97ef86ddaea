"""Augmentation policies: which operations a training image goes through, decided by draws alone.

A stage turns uint8 [h, w, C] into uint8 of that shape; `num_draws` numbers in [0, 1) decide everything that is random
in it. An image goes through at most one policy (RandAugment in one of two semantics, or 3-Augment), then colour
jitter, then random erasing: timm's order. `docs/augment.md` has the references.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from pretrain.config import (
    AugmentConfig,
    BigVisionRandAugmentConfig,
    ColorJitterConfig,
    ModelConfig,
    TimmRandAugmentConfig,
)
from pretrain.data import ops_pillow as pil
from pretrain.data import ops_tensorflow as tf
from pretrain.data.box import Pixels
from pretrain.data.erasing import RandomErasing
from pretrain.draws import FloatArray, IntArray, Stream, normal, uniform

Draws = Sequence[float]


class Stage(Protocol):
    num_draws: int

    def apply(self, image: Pixels, draws: Draws) -> Pixels:
        """uint8 [h, w, C] and `num_draws` numbers in [0, 1) -> uint8 [h, w, C]; the image itself stays as it is."""


class Policy:
    """The stages of a config, drawn by (seed, epoch, sample, repeat): the same on any rank, thread or restart."""

    def __init__(self, config: AugmentConfig, model: ModelConfig, interpolation: str, seed: int) -> None:
        self._stages, self._seed = _stages(config, model, pil.RESAMPLING[interpolation]), seed
        self.num_draws = sum(stage.num_draws for stage in self._stages)

    def draws(self, low: IntArray, high: IntArray, epoch: IntArray) -> FloatArray:
        """float64 [n, num_draws] in [0, 1) for samples by epoch and the two words of number and repeat."""
        if self.num_draws == 0:
            return np.empty((len(low), 0))
        return uniform(self._seed, Stream.POLICY, self.num_draws, low, high, epoch)

    def apply(self, image: Pixels, draws: FloatArray) -> Pixels:
        """uint8 [h, w, C], draws: float64 [num_draws] -> uint8 [h, w, C]."""
        numbers = draws.tolist()
        for stage in self._stages:
            image = stage.apply(image, numbers[: stage.num_draws])
            numbers = numbers[stage.num_draws :]
        return image


def _stages(config: AugmentConfig, model: ModelConfig, resample: Image.Resampling) -> list[Stage]:
    mean, std = ((v * model.in_chans)[: model.in_chans] for v in (model.mean, model.std))
    stages: list[Stage] = []
    if config.randaugment_timm is not None:
        stages.append(TimmRandAugment(config.randaugment_timm, resample, [round(255 * m) for m in mean]))
    if config.randaugment_bv is not None:
        stages.append(BigVisionRandAugment(config.randaugment_bv))
    if config.three_augment:
        stages.append(ThreeAugment())
    if config.color_jitter is not None:
        stages.append(ColorJitter(config.color_jitter))
    if config.random_erasing is not None:
        stages.append(RandomErasing(config.random_erasing, mean, std))
    return stages


class TimmRandAugment:
    """RandAugment (Cubuk et al. 2019, arXiv 1909.13719) as timm's `rand_augment_transform` has it.

    Each of `num_ops` operations is drawn with replacement, applied with probability `prob`, at a magnitude from a
    normal distribution cut to [0, 10]. Geometry interpolates with `resample`; what comes from outside is `fill`, one
    value a channel (timm passes the model's mean).
    """

    _DRAWS = 5
    """Which, whether, two for the magnitude, the sign."""

    def __init__(
        self, config: TimmRandAugmentConfig, resample: Image.Resampling, fill: Sequence[int]
    ) -> None:
        self._config = config
        self.ops = list(timm_ops(config.increasing, resample, fill).values())
        self.num_draws = self._DRAWS * config.num_ops

    def apply(self, image: Pixels, draws: Draws) -> Pixels:
        config = self._config
        for i in range(config.num_ops):
            which, whether, first, second, sign = draws[self._DRAWS * i : self._DRAWS * (i + 1)]
            if whether > config.prob:
                continue
            magnitude = config.magnitude + config.magnitude_std * float(normal(first, second))
            op = self.ops[int(which * len(self.ops))]
            image = op(image, max(0.0, min(magnitude, 10.0)), -1.0 if sign > 0.5 else 1.0)
        return image


TimmOp = Callable[[Pixels, float, float], Pixels]
"""(image, magnitude in [0, 10], sign 1 or -1) -> image."""


def timm_ops(increasing: bool, resample: Image.Resampling, fill: Sequence[int]) -> dict[str, TimmOp]:
    """timm's 15 operations in its order, by its names; four change with `increasing`."""

    def factor(m: float, sign: float) -> float:
        return max(0.1, 1.0 + sign * (m / 10.0 * 0.9)) if increasing else m / 10.0 * 1.8 + 0.1

    def bits(m: float) -> int:
        return 4 - int(m / 10.0 * 4) if increasing else int(m / 10.0 * 4)

    def threshold(m: float) -> int:
        return 256 - min(256, int(m / 10.0 * 256)) if increasing else min(256, int(m / 10.0 * 256))

    def moved(image: Pixels, matrix: pil.Affine) -> Pixels:
        return pil.affine(image, matrix, resample, fill)

    return {
        "AutoContrast": lambda x, m, sign: pil.autocontrast(x),
        "Equalize": lambda x, m, sign: pil.equalize(x),
        "Invert": lambda x, m, sign: pil.invert(x),
        "Rotate": lambda x, m, sign: pil.rotate(x, sign * (m / 10.0 * 30.0), resample, fill),
        "Posterize": lambda x, m, sign: pil.posterize(x, bits(m)),
        "Solarize": lambda x, m, sign: pil.solarize(x, threshold(m)),
        "SolarizeAdd": lambda x, m, sign: pil.solarize_add(x, min(128, int(m / 10.0 * 110))),
        "Color": lambda x, m, sign: pil.color(x, factor(m, sign)),
        "Contrast": lambda x, m, sign: pil.contrast(x, factor(m, sign)),
        "Brightness": lambda x, m, sign: pil.brightness(x, factor(m, sign)),
        "Sharpness": lambda x, m, sign: pil.sharpness(x, factor(m, sign)),
        "ShearX": lambda x, m, sign: moved(x, (1, sign * (m / 10.0 * 0.3), 0, 0, 1, 0)),
        "ShearY": lambda x, m, sign: moved(x, (1, 0, 0, sign * (m / 10.0 * 0.3), 1, 0)),
        "TranslateX": lambda x, m, sign: moved(x, (1, 0, sign * (m / 10.0 * 0.45) * x.shape[1], 0, 1, 0)),
        "TranslateY": lambda x, m, sign: moved(x, (1, 0, 0, 0, 1, sign * (m / 10.0 * 0.45) * x.shape[0])),
    }


class BigVisionRandAugment:
    """RandAugment as big_vision's `randaug(num_ops, magnitude)` has it: every operation drawn is applied."""

    _DRAWS = 4
    """Which, the sign, row and column of a cutout."""

    def __init__(self, config: BigVisionRandAugmentConfig) -> None:
        self._config = config
        self.ops = list(BIG_VISION_OPS.values())
        self.num_draws = self._DRAWS * config.num_ops

    def apply(self, image: Pixels, draws: Draws) -> Pixels:
        for i in range(self._config.num_ops):
            which, sign, row, column = draws[self._DRAWS * i : self._DRAWS * (i + 1)]
            centre = int(row * image.shape[0]), int(column * image.shape[1])
            op = self.ops[int(which * len(self.ops))]
            image = op(image, self._config.magnitude, 1.0 if sign >= 0.5 else -1.0, centre)
        return image


BigVisionOp = Callable[[Pixels, float, float, tuple[int, int]], Pixels]
"""(image, magnitude, sign 1 or -1, row and column) -> image."""

BIG_VISION_OPS: dict[str, BigVisionOp] = {
    "AutoContrast": lambda x, m, sign, at: tf.autocontrast(x),
    "Equalize": lambda x, m, sign, at: pil.equalize(x),
    "Invert": lambda x, m, sign, at: pil.invert(x),
    "Rotate": lambda x, m, sign, at: tf.rotate(x, sign * (m / 10.0 * 30.0)),
    "Posterize": lambda x, m, sign, at: tf.posterize(x, int(m / 10.0 * 4)),
    "Solarize": lambda x, m, sign, at: tf.solarize(x, int(m / 10.0 * 256)),
    "Color": lambda x, m, sign, at: tf.color(x, m / 10.0 * 1.8 + 0.1),
    "Contrast": lambda x, m, sign, at: tf.contrast(x, m / 10.0 * 1.8 + 0.1),
    "Brightness": lambda x, m, sign, at: tf.brightness(x, m / 10.0 * 1.8 + 0.1),
    "Sharpness": lambda x, m, sign, at: tf.sharpness(x, m / 10.0 * 1.8 + 0.1),
    "ShearX": lambda x, m, sign, at: tf.shear_x(x, sign * (m / 10.0 * 0.3)),
    "ShearY": lambda x, m, sign, at: tf.shear_y(x, sign * (m / 10.0 * 0.3)),
    "TranslateX": lambda x, m, sign, at: tf.translate_x(x, sign * (m / 10.0 * 100.0)),
    "TranslateY": lambda x, m, sign, at: tf.translate_y(x, sign * (m / 10.0 * 100.0)),
    "Cutout": lambda x, m, sign, at: tf.cutout(x, int(m / 10.0 * 40), *at),
    "SolarizeAdd": lambda x, m, sign, at: pil.solarize_add(x, int(m / 10.0 * 110)),
}
"""big_vision's 16 operations in its order, by its names."""


class ThreeAugment:
    """3-Augment (Touvron et al. 2022, arXiv 2204.07118, section 3.3): greyscale, solarize or blur, a third each."""

    num_draws = 2
    """Which, and the radius of a blur."""

    def apply(self, image: Pixels, draws: Draws) -> Pixels:
        match int(draws[0] * 3):
            case 0:
                return pil.greyscale(image)
            case 1:
                return pil.solarize(image, 128)
            case _:
                return pil.gaussian_blur(image, 0.1 + (2.0 - 0.1) * draws[1])


class ColorJitter:
    """torchvision's `ColorJitter` on Pillow images: each adjustment once, in an order that is drawn."""

    num_draws = 8
    """The order, then brightness, contrast, saturation and hue."""

    def __init__(self, config: ColorJitterConfig) -> None:
        def around_one(reach: float) -> tuple[float, float] | None:
            return (max(0.0, 1.0 - reach), 1.0 + reach) if reach else None

        self._adjustments = (
            (pil.brightness, around_one(config.brightness)),
            (pil.contrast, around_one(config.contrast)),
            (pil.color, around_one(config.saturation)),
            (pil.hue, (-config.hue, config.hue) if config.hue else None),
        )

    def apply(self, image: Pixels, draws: Draws) -> Pixels:
        for which in np.argsort(draws[:4], kind="stable"):
            adjust, bounds = self._adjustments[which]
            if bounds is not None:
                image = adjust(image, bounds[0] + (bounds[1] - bounds[0]) * draws[4 + which])
        return image
