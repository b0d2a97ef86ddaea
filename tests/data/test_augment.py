import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop, Resize
from torchvision.transforms.functional import pad

from pretrain.config import AugmentConfig, ModelConfig
from pretrain.data.augment import NUM_DRAWS, EvalView, TrainView, middle, random_resized_box
from pretrain.data.box import Box, crop, whole
from pretrain.data.crops import INCEPTION_DRAWS, inception_box
from pretrain.data.policies import Policy
from pretrain.data.resize import resize

MODEL = ModelConfig(size="Ti", img_size=(16, 16), patch_size=(4, 4), num_classes=2)
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def pixels_of(picture: Image.Image) -> np.ndarray:
    """uint8 [h, w, C]"""
    array = np.array(picture)
    return array if array.ndim == 3 else array[:, :, None]


def rendered(
    view: TrainView | EvalView, picture: Image.Image, draws: np.ndarray, size=(16, 16)
) -> np.ndarray:
    """The view as it stands in a row of a batch; the rows around it stay as they were."""
    pixels = pixels_of(picture)
    batch = np.full((3, *size, pixels.shape[2]), 77, np.uint8)
    view.render(crop(pixels, view.part(draws, *pixels.shape[:2])), draws, batch[1])
    assert (batch[[0, 2]] == 77).all()
    return batch[1] if pixels.shape[2] == 3 else batch[1, :, :, 0]


def assert_alike(ours: np.ndarray, theirs: Image.Image, rounding: int = 1) -> None:
    """Equal but for how the last bit is rounded."""
    difference = np.abs(ours.astype(int) - np.asarray(theirs))
    assert difference.max() <= rounding
    assert difference.mean() < 0.1


def image(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def torchvision_box(height, width, scale, ratio, seed):
    """torchvision's box under a torch seed, and the draws in [0, 1) that lead ours to the same decisions."""
    torch.manual_seed(seed)
    box = RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), list(ratio))
    torch.manual_seed(seed)
    draws = np.zeros(NUM_DRAWS)
    for attempt in range(10):
        area, shape = torch.rand(1).item(), torch.rand(1).item()
        draws[4 * attempt : 4 * attempt + 2] = area, shape
        target = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** shape
        h, w = round(math.sqrt(target / aspect)), round(math.sqrt(target * aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = (torch.randint(0, n, (1,)).item() for n in (height - h + 1, width - w + 1))
            draws[4 * attempt + 2 : 4 * attempt + 4] = (
                (top + 0.5) / (height - h + 1),
                (left + 0.5) / (width - w + 1),
            )
            break
    return box, draws


@pytest.mark.parametrize("size", [(480, 640), (333, 97), (28, 28), (40, 400), (400, 40)])
@pytest.mark.parametrize(("scale", "ratio"), [((0.08, 1.0), (0.75, 4 / 3)), ((0.9, 1.0), (0.5, 0.6))])
def test_the_crop_box_is_torchvisions(size, scale, ratio):
    fell_back = 0
    for seed in range(200):
        box, draws = torchvision_box(*size, scale, ratio, seed)
        assert tuple(random_resized_box(*size, scale, ratio, draws)) == tuple(box)
        fell_back += draws[39] == 0
    if size[0] / size[1] >= 10 or size[1] / size[0] >= 10:
        assert fell_back or scale[0] < 0.5  # the central fallback was exercised


def test_draws_depend_on_epoch_and_sample_alone():
    view = TrainView(AugmentConfig(), MODEL, "bilinear", seed=3)
    together = view.draws(np.array([0, 0, 1]), np.array([5, 6, 5]))
    for row, (epoch, sample) in zip(together, [(0, 5), (0, 6), (1, 5)], strict=True):
        np.testing.assert_array_equal(view.draws(np.array([epoch]), np.array([sample]))[0], row)
    assert len({tuple(row) for row in together}) == 3
    assert (
        TrainView(AugmentConfig(), MODEL, "bilinear", seed=4).draws(np.array([0]), np.array([5]))
        != together[0]
    ).all()


def test_copies_of_a_sample_have_draws_of_their_own_and_the_first_those_of_a_lone_one():
    view = TrainView(AugmentConfig(three_augment=True), MODEL, "bilinear", seed=3)
    epoch, sample = np.array([2, 2, 2, 2]), np.array([5, 5, 2**40 + 5, 2**40 + 5])
    copies = view.draws(epoch, sample, np.array([0, 255, 0, 255]))
    np.testing.assert_array_equal(copies[[0, 2]], view.draws(epoch[[0, 2]], sample[[0, 2]]))
    for draws in (copies[:, :NUM_DRAWS], copies[:, NUM_DRAWS:]):  # of crop and flip, and of the policy
        assert len({tuple(row) for row in draws}) == 4


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_training_view_is_torchvisions_crop_and_resize(interpolation):
    view = TrainView(AugmentConfig(hflip=False), MODEL, interpolation, seed=0)
    theirs = Resize((24, 20), MODES[interpolation], antialias=True)
    for sample in range(20):
        picture = image(60, 90, sample)
        draws = view.draws(np.array([0]), np.array([sample]))[0]
        top, left, height, width = random_resized_box(60, 90, (0.08, 1.0), (0.75, 4 / 3), draws)
        expected = theirs(picture.crop((left, top, left + width, top + height)))
        assert_alike(rendered(view, picture, draws, (24, 20)), expected)


def test_half_of_the_views_are_mirrored():
    view = TrainView(AugmentConfig(crop="resize"), MODEL, "bilinear", seed=0)
    picture = image(16, 16)
    draws = view.draws(np.zeros(400, dtype=np.int64), np.arange(400))
    pixels = np.asarray(picture)
    mirrored = [np.array_equal(rendered(view, picture, row), pixels[:, ::-1]) for row in draws]
    plain = [np.array_equal(rendered(view, picture, row), pixels) for row in draws]
    assert all(a != b for a, b in zip(mirrored, plain, strict=True))
    assert 160 < sum(mirrored) < 240


def test_the_flip_is_drawn_apart_from_the_crop():
    view = TrainView(AugmentConfig(), MODEL, "bilinear", seed=0)
    draws = view.draws(np.zeros(4000, dtype=np.int64), np.arange(4000))
    rising = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1)))
    views = [rendered(view, rising, row, (8, 8)).astype(int) for row in draws]
    mirrored = np.array([pixels[0, 0] > pixels[0, -1] for pixels in views])
    boxes = np.array([random_resized_box(64, 64, (0.08, 1.0), (0.75, 4 / 3), row) for row in draws])
    for side in boxes.T:
        assert abs(np.corrcoef(mirrored, side)[0, 1]) < 0.06


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (16, 40)])
def test_a_simple_view_is_deits_resize_and_crop(height: int, width: int):
    view = TrainView(AugmentConfig(crop="resize_crop", hflip=False), MODEL, "bicubic", seed=0)
    picture = image(height, width)
    shorter = Resize(16, MODES["bicubic"], antialias=True)(picture)
    padded = pad(shorter, [4], padding_mode="reflect")
    for draws in view.draws(np.zeros(20, dtype=np.int64), np.arange(20)):
        left, top = (int(draw * (n + 8 - 16 + 1)) for draw, n in zip(draws[1::-1], shorter.size, strict=True))
        assert_alike(rendered(view, picture, draws), padded.crop((left, top, left + 16, top + 16)))


def test_an_inception_view_is_its_box_resized():
    view = TrainView(AugmentConfig(crop="inception", hflip=False), MODEL, "bilinear", seed=0)
    picture = image(60, 90)
    boxes = set()
    for draws in view.draws(np.zeros(20, dtype=np.int64), np.arange(20)):
        tries = draws[:INCEPTION_DRAWS].reshape(-1, 4).tolist()
        top, left, height, width = inception_box(60, 90, (0.08, 1.0), (0.75, 4 / 3), tries)
        expected = np.empty((16, 16, 3), np.uint8)
        resize(pixels_of(picture)[top : top + height, left : left + width], expected, "bilinear")
        np.testing.assert_array_equal(rendered(view, picture, draws), expected)
        boxes.add((top, left, height, width))
    assert len(boxes) > 15


@pytest.mark.parametrize("crop", ["random_resized", "inception", "resize_crop", "resize"])
def test_a_policy_is_applied_to_the_cropped_and_mirrored_view(crop: str):
    config = AugmentConfig.model_validate(
        {"crop": crop, "three_augment": True, "random_erasing": {"prob": 0.5}}
    )
    with_policy, without = (
        TrainView(c, MODEL, "bilinear", seed=2)
        for c in (config, AugmentConfig.model_validate({"crop": crop}))
    )
    policy = Policy(config, MODEL, "bilinear", seed=2)
    picture, epoch, sample = image(40, 50), np.ones(8, dtype=np.int64), np.arange(8)
    rows = (
        with_policy.draws(epoch, sample),
        without.draws(epoch, sample),
        policy.draws(sample, np.zeros_like(sample), epoch),
    )
    for both, plain, drawn in zip(*rows, strict=True):
        np.testing.assert_array_equal(
            both, np.concatenate([plain, drawn])
        )  # the crop does not depend on a policy
        expected = policy.apply(rendered(without, picture, plain), drawn)
        np.testing.assert_array_equal(rendered(with_policy, picture, both), expected)


def test_without_random_parts_a_view_is_the_resized_image():
    view = TrainView(AugmentConfig(crop="resize", hflip=False), MODEL, "bicubic", seed=0)
    picture = image(33, 47)
    expected = picture.resize((10, 12), Image.Resampling.BICUBIC)
    for row in view.draws(np.zeros(5, dtype=np.int64), np.arange(5)):
        assert_alike(rendered(view, picture, row, (12, 10)), expected)


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (28, 28), (224, 225), (17, 300), (300, 17)])
@pytest.mark.parametrize("keep", [1.0, 0.875, 0.95])
def test_the_evaluation_view_is_torchvisions(size, keep):
    picture = image(*size)
    ours = rendered(EvalView(keep, "bicubic"), picture, np.empty(0), (28, 28))
    shorter = Resize(math.floor(28 / keep), MODES["bicubic"], antialias=True)(picture)
    assert_alike(ours, CenterCrop(28)(shorter))


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (16, 400), (400, 16)])
def test_an_oblong_evaluation_view_keeps_the_shape_of_things(size):
    """A horizontal and a vertical ramp keep the ratio of their slopes, whatever is cropped."""
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]]
    for target in [(24, 48), (48, 24)]:
        slopes = []
        for ramp, axis in ((rows, 0), (columns, 1)):
            picture = Image.fromarray((ramp * 255 / max(size)).astype(np.uint8))
            view = rendered(EvalView(1.0, "bilinear"), picture, np.empty(0), target).astype(float)
            assert view.shape == target
            inner = np.take(view, range(6, view.shape[axis] - 6), axis)
            slopes.append((inner.max() - inner.min()) / (inner.shape[axis] - 1))
        assert slopes[0] == pytest.approx(slopes[1], rel=0.25, abs=0.15)


@pytest.mark.parametrize("shape", [(1, 500_000, 3), (500_000, 1, 1)])
def test_a_thread_of_pixels_is_no_bomb(shape: tuple[int, int, int]) -> None:
    """To cover 224 pixels with all of it would take 75 GB."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    out = np.zeros((224, 224, shape[2]), np.uint8)
    view, draws = EvalView(1.0, "bilinear"), np.empty(0)
    view.render(crop(pixels, view.part(draws, *shape[:2])), draws, out)
    centre = pixels.reshape(-1, shape[2])[shape[0] * shape[1] // 2 - 2 : shape[0] * shape[1] // 2 + 2]
    assert centre.min() <= out.min() <= out.max() <= centre.max()


def test_pictures_up_to_64_times_as_long_as_wide_are_looked_at_whole() -> None:
    assert middle(3, 192) == whole(3, 192)
    assert middle(3, 194) == Box(0, 1, 3, 192)
