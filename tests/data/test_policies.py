"""Operations and policies against the code that defines them: timm's and torchvision's beside ours, big_vision's by the
answers that TensorFlow gave to a transcription of it."""

import json
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from scipy.stats import kstest
from timm.data import auto_augment as timm
from timm.data.random_erasing import RandomErasing as TimmErasing
from torchvision import transforms

from pretrain.config import AugmentConfig, ModelConfig, RandomErasingConfig
from pretrain.config.augment import BigVisionRandAugmentConfig, ColorJitterConfig, TimmRandAugmentConfig
from pretrain.data import ops_pillow, ops_tensorflow
from pretrain.data.erasing import RandomErasing
from pretrain.data.policies import (
    BIG_VISION_OPS,
    BigVisionRandAugment,
    ColorJitter,
    Policy,
    ThreeAugment,
    TimmRandAugment,
    timm_ops,
)
from pretrain.draws import Stream, normal, uniform

PHOTOS = Path(sklearn.datasets.__file__).parent / "images"
BICUBIC = Image.Resampling.BICUBIC
FILL = (124, 116, 104)
ANSWERS = json.loads((Path(__file__).parent / "tensorflow.json").read_text())
"""`operations`: CRC-32 of what a transcription of big_vision's `pp/autoaugment.py` (538b8a8) made of two images, TensorFlow 2.21
and numpy 1.26, by operation and signed magnitude; `tfa.image` stood for by the same kernel in TensorFlow's own
`ImageProjectiveTransformV3`. `inputs`: CRC-32 of the images."""


def photo(name: str = "china", size: tuple[int, int] = (91, 60)) -> np.ndarray:
    return np.asarray(Image.open(PHOTOS / f"{name}.jpg").resize(size))


IMAGES = {
    "china_odd": photo(),
    "noise": np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8),
    "flat": np.full((20, 30, 3), 77, np.uint8),
    "dark": photo("flower") // 4 + 30,
}


def grey(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]


def model(in_chans: int = 3) -> ModelConfig:
    return ModelConfig(
        size="Ti",
        img_size=(16, 16),
        patch_size=(4, 4),
        num_classes=2,
        in_chans=in_chans,
        mean=(0.48,),
        std=(0.23,),
    )


class Scripted:
    """Stands for the module `random` in timm's code, which then decides as our draws do."""

    def __init__(self, whether: float, gauss: float, sign: float) -> None:
        self.answers, self.normal = [whether, sign], gauss

    def random(self) -> float:
        return self.answers.pop(0)

    def gauss(self, mean: float, std: float) -> float:
        return mean + std * self.normal


def timm_names(increasing: bool) -> list[str]:
    return timm._RAND_INCREASING_TRANSFORMS if increasing else timm._RAND_TRANSFORMS


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("picture", IMAGES)
def test_every_operation_is_timms(picture: str, increasing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = timm_ops(increasing, BICUBIC, FILL)
    names = timm_names(increasing)
    assert list(ours) == [name.removesuffix("Increasing").removesuffix("Rel") for name in names]
    for name, op in zip(names, ours.values(), strict=True):
        for magnitude in (0, 0.4, 1, 2.5, 5, 7.3, 9, 10):
            for sign in (1.0, -1.0):
                scripted = Scripted(0.0, 0.0, 0.9 if sign < 0 else 0.1)
                scripted.answers.pop(0)  # with prob 1 timm does not ask whether
                monkeypatch.setattr(timm, "random", scripted)
                theirs = timm.AugmentOp(name, 1.0, magnitude, {"img_mean": FILL, "interpolation": BICUBIC})
                if name.startswith("Posterize") and theirs.level_fn(magnitude, {})[0] == 0:
                    expected = np.zeros_like(
                        IMAGES[picture]
                    )  # no bit kept; Pillow 13 refuses, older ones make black
                else:
                    expected = np.asarray(theirs(Image.fromarray(IMAGES[picture])))
                got = op(IMAGES[picture], magnitude, sign)
                np.testing.assert_array_equal(got, expected, f"{name} {magnitude} {sign}")


def test_randaugment_decides_as_timm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = timm.rand_augment_transform(
        "rand-m9-n2-mstd0.5-inc1", {"img_mean": FILL, "interpolation": BICUBIC}
    )
    ours = TimmRandAugment(TimmRandAugmentConfig(), BICUBIC, FILL)
    changed = 0
    for draws in uniform(0, Stream.POLICY, ours.num_draws, np.arange(150)).tolist():
        expected = Image.fromarray(IMAGES["china_odd"])
        for which, whether, first, second, sign in (draws[:5], draws[5:]):
            monkeypatch.setattr(timm, "random", Scripted(whether, float(normal(first, second)), sign))
            expected = theirs.ops[int(which * 15)](expected)
        got = ours.apply(IMAGES["china_odd"], draws)
        np.testing.assert_array_equal(got, np.asarray(expected))
        changed += not np.array_equal(got, IMAGES["china_odd"])
    assert 90 < changed < 135  # 3/4, less what an operation leaves alone


def test_operations_and_magnitudes_are_drawn_as_timm_draws_them() -> None:
    draws = uniform(0, Stream.POLICY, 5, np.arange(6000))
    assert kstest(draws[:, 0], "uniform").pvalue > 1e-3
    assert kstest(normal(draws[:, 2], draws[:, 3]), "norm").pvalue > 1e-3
    assert abs((draws[:, 1] <= 0.5).mean() - 0.5) < 0.02


@pytest.mark.parametrize("name", [n for n in BIG_VISION_OPS if n != "Cutout"])
@pytest.mark.parametrize("picture", ["china_odd", "noise"])
def test_every_operation_is_big_visions(picture: str, name: str) -> None:
    image = IMAGES[picture]
    assert crc(image) == ANSWERS["inputs"][picture], "not the image that TensorFlow was given"
    answers = ANSWERS["operations"][f"{picture}/{name}"]
    assert len(answers) >= 8
    for magnitude, expected in answers.items():
        sign = -1.0 if magnitude.startswith("-") else 1.0
        got = BIG_VISION_OPS[name](image, abs(float(magnitude)), sign, (0, 0))
        assert crc(got) == expected, magnitude


def crc(image: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(image).tobytes()):08x}"


def test_a_cutout_is_a_grey_square_cut_off_at_the_edges() -> None:
    image = IMAGES["noise"]
    out = ops_tensorflow.cutout(image, 10, 3, 40)
    inside = np.zeros(image.shape[:2], bool)
    inside[0:13, 30:48] = True
    assert (out[inside] == 128).all()
    np.testing.assert_array_equal(out[~inside], image[~inside])


def test_big_visions_randaugment_applies_each_operation_drawn() -> None:
    stage = BigVisionRandAugment(BigVisionRandAugmentConfig(magnitude=15.0, num_ops=2))
    names = list(BIG_VISION_OPS)
    image = IMAGES["china_odd"]
    for draws in uniform(0, Stream.POLICY, stage.num_draws, np.arange(60)).tolist():
        expected = image
        for which, sign, row, column in (draws[:4], draws[4:]):
            at = int(row * 60), int(column * 91)
            op = BIG_VISION_OPS[names[int(which * 16)]]
            expected = op(expected, 15.0, 1.0 if sign >= 0.5 else -1.0, at)
        np.testing.assert_array_equal(stage.apply(image, draws), expected)


def test_three_augment_is_deits_three_transforms() -> None:
    stage, image = ThreeAugment(), IMAGES["china_odd"]
    pillow = Image.fromarray(image)
    kinds = [0, 0, 0]
    for which, radius in uniform(0, Stream.POLICY, 2, np.arange(60)).tolist():
        kind = int(which * 3)
        kinds[kind] += 1
        expected = (
            transforms.Grayscale(3)(pillow),
            transforms.RandomSolarize(128, 1.0)(pillow),
            timm.gaussian_blur(pillow, 0.1 + 1.9 * radius),
        )[kind]
        np.testing.assert_array_equal(stage.apply(image, [which, radius]), np.asarray(expected))
    assert min(kinds) > 10


def test_colour_jitter_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = transforms.ColorJitter(0.3, 0.4, 1.5, 0.2)
    ours = ColorJitter(ColorJitterConfig(brightness=0.3, contrast=0.4, saturation=1.5, hue=0.2))
    bounds = (theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue)
    orders = set()
    for draws in uniform(0, Stream.POLICY, 8, np.arange(80)).tolist():
        order = sorted(range(4), key=lambda i: draws[i])
        factors = [low + (high - low) * draw for (low, high), draw in zip(bounds, draws[4:], strict=True)]
        params = (torch.tensor(order), *factors)
        monkeypatch.setattr(
            transforms.ColorJitter, "get_params", staticmethod(lambda *_, params=params: params)
        )
        for image in (IMAGES["china_odd"], IMAGES["noise"]):
            np.testing.assert_array_equal(
                ours.apply(image, draws), np.asarray(theirs(Image.fromarray(image)))
            )
        orders.add(tuple(order))
    assert len(orders) > 20  # of 24


def test_an_adjustment_of_no_reach_is_left_out() -> None:
    jitter = ColorJitter(ColorJitterConfig(brightness=0.3))
    image = IMAGES["noise"]
    draws = [0.1, 0.2, 0.3, 0.4, 0.9, 0.9, 0.9, 0.9]
    np.testing.assert_array_equal(jitter.apply(image, draws), ops_pillow.brightness(image, 0.7 + 0.6 * 0.9))


@pytest.mark.parametrize("count", [1, 3])
def test_erased_boxes_are_timms(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = TimmErasing(0.6, mode="const", min_count=count, device="cpu")
    ours = RandomErasing(RandomErasingConfig(prob=0.6, mode="const", count=count), (0.5,) * 3, (0.5,) * 3)
    erased = 0
    for draws in uniform(0, Stream.POLICY, ours.num_draws, np.arange(200)).tolist():
        image = np.full((40, 60, 3), 7, np.uint8)
        floats = torch.ones(3, 40, 60)
        answers = iter([draws[0], *places(draws[3:], count, 40, 60)])
        monkeypatch.setattr(random, "random", lambda answers=answers: next(answers))
        monkeypatch.setattr(random, "uniform", lambda a, b, answers=answers: a + (b - a) * next(answers))
        monkeypatch.setattr(random, "randint", lambda a, b, answers=answers: int(next(answers) * (b + 1)))
        expected = theirs(floats)[0].numpy() == 0
        monkeypatch.undo()
        got = ours.apply(image, draws)
        np.testing.assert_array_equal((got == 128).all(2), expected)
        assert (image == 7).all()
        erased += expected.any()
    assert 100 < erased < 140


def places(draws: list[float], count: int, height: int, width: int) -> list[float]:
    """Our draws in the order in which timm asks: top and left only for a box that fits."""
    asked = []
    for box in range(count):
        for i in range(40 * box, 40 * box + 40, 4):
            area = (0.02 + (1 / 3 - 0.02) * draws[i]) * height * width / count
            shape = np.exp(np.log(0.3) + (np.log(1 / 0.3) - np.log(0.3)) * draws[i + 1])
            fits = round(np.sqrt(area / shape)) < width and round(np.sqrt(area * shape)) < height
            asked += draws[i : i + 4] if fits else draws[i : i + 2]
            if fits:
                break
    return asked


def test_pixel_noise_is_normal_around_the_models_mean_and_depends_on_the_draws_alone() -> None:
    stage = RandomErasing(
        RandomErasingConfig(prob=1.0, area=(0.9, 0.9), ratio=(1.0, 1.0)), (0.5, 0.4, 0.45), (0.1,) * 3
    )
    image = np.zeros((200, 200, 3), np.uint8)
    draws = uniform(0, Stream.POLICY, stage.num_draws, [1, 2]).tolist()
    first = stage.apply(image, draws[0])
    noise = first[first.any(2)].astype(float)
    assert len(noise) == pytest.approx(0.9 * 200 * 200, rel=0.02)
    for channel, mean in enumerate((0.5, 0.4, 0.45)):
        assert noise[:, channel].mean() == pytest.approx(255 * mean, abs=0.6)
        assert noise[:, channel].std() == pytest.approx(25.5, abs=0.5)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.02
    np.testing.assert_array_equal(stage.apply(image, draws[0]), first)
    assert not np.array_equal(stage.apply(image, draws[1]), first)


COLOUR_ALONE = {"Color"}


def test_on_greyscale_what_concerns_colour_is_the_identity_and_the_rest_is_that_of_a_grey_image() -> None:
    """Pillow's own operations of mode L are the reference; big_vision's, that of three equal channels."""
    image = grey(IMAGES["china_odd"])
    wide = image.repeat(3, axis=2)
    for name, op in timm_ops(True, BICUBIC, (124,)).items():
        got = op(image, 7.0, 1.0)
        assert got.shape == image.shape
        if name in COLOUR_ALONE:
            np.testing.assert_array_equal(got, image)
        else:
            expected = timm_ops(True, BICUBIC, (124,) * 3)[name](wide, 7.0, 1.0)[:, :, :1]
            np.testing.assert_array_equal(got, expected, name)
    for name, big_vision in BIG_VISION_OPS.items():
        got = big_vision(image, 7.0, 1.0, (5, 5))
        expected = image if name in COLOUR_ALONE else big_vision(wide, 7.0, 1.0, (5, 5))[:, :, :1]
        np.testing.assert_array_equal(got, expected, name)
    for identity in (ops_pillow.greyscale(image), ops_pillow.hue(image, 0.3)):
        np.testing.assert_array_equal(identity, image)


EVERYTHING = AugmentConfig.model_validate(
    {"three_augment": True, "color_jitter": {"brightness": 0.3}, "random_erasing": {"prob": 1.0}}
)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_stages_follow_one_another_each_on_its_own_draws(in_chans: int) -> None:
    policy = Policy(EVERYTHING, model(in_chans), "bicubic", seed=3)
    stages = (
        ThreeAugment(),
        ColorJitter(ColorJitterConfig(brightness=0.3)),
        RandomErasing(RandomErasingConfig(prob=1.0), (0.48,) * in_chans, (0.23,) * in_chans),
    )
    assert policy.num_draws == sum(stage.num_draws for stage in stages)
    image = IMAGES["noise"] if in_chans == 3 else grey(IMAGES["noise"])
    for draws in policy.draws(np.arange(10), *np.zeros((2, 10), np.int64)):
        expected, start = image, 0
        for stage in stages:
            expected = stage.apply(expected, draws[start : start + stage.num_draws].tolist())
            start += stage.num_draws
        got = policy.apply(image, draws)
        assert (got.shape, got.dtype) == (image.shape, np.uint8)
        np.testing.assert_array_equal(got, expected)


def test_draws_depend_on_seed_epoch_and_sample_alone() -> None:
    policy = Policy(EVERYTHING, model(), "bicubic", seed=3)
    keys = np.array([[5, 0, 0], [6, 0, 0], [5, 1, 0], [5, 0, 1]])
    together = policy.draws(*keys.T)
    for row, key in zip(together, keys, strict=True):
        np.testing.assert_array_equal(policy.draws(*key[:, None])[0], row)
    assert len({tuple(row) for row in together}) == 4
    other = Policy(EVERYTHING, model(), "bicubic", seed=4).draws(*keys.T)
    assert (other != together).all()


def test_without_a_policy_nothing_is_drawn_or_done() -> None:
    policy = Policy(AugmentConfig(), model(), "bicubic", seed=0)
    draws = policy.draws(np.arange(4), *np.zeros((2, 4), np.int64))
    assert draws.shape == (4, 0)
    assert policy.apply(IMAGES["noise"], draws[0]) is IMAGES["noise"]
