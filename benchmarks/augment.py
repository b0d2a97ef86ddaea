"""What an augmentation policy costs an image: ours on uint8 pixels, and the libraries' own on Pillow images.

    python benchmarks/augment.py --image photo.jpg

Each contender is given one picture, cropped already, and returns augmented ones of the kind that it was given; our
figure includes the draws. CPU time of this thread; rounds are interleaved, and the ratio is that of a round's two times.
"""

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from pretrain.config import AugmentConfig, ModelConfig
from pretrain.data.policies import Policy

JITTER = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3}
OURS: dict[str, dict[str, object]] = {
    "randaugment_timm": {"randaugment_timm": {}},
    "randaugment_bv": {"randaugment_bv": {"magnitude": 15.0}},
    "three_augment, color_jitter": {"three_augment": True, "color_jitter": JITTER},
    "color_jitter": {"color_jitter": JITTER},
    "random_erasing, pixel": {"random_erasing": {"mode": "pixel"}},
    "random_erasing, const": {"random_erasing": {"mode": "const"}},
}
Augment = Callable[[Image.Image], object]


def theirs(size: int) -> dict[str, Augment]:
    """The same by timm and torchvision, where they have it; big_vision's runs in TensorFlow."""
    rand = auto_augment.rand_augment_transform(
        "rand-m9-n2-mstd0.5-inc1", {"img_mean": (128,) * 3, "interpolation": Image.Resampling.BICUBIC}
    )

    def randaugment(image: Image.Image) -> object:
        try:
            return rand(image)
        except ValueError:  # timm 1.0 asks for 0 bits at magnitude 10, which Pillow 13 refuses
            return image

    def blur(image: Image.Image) -> object:
        return auto_augment.gaussian_blur(image, random.uniform(0.1, 2.0))

    jitter = transforms.ColorJitter(**JITTER)
    one_of = transforms.RandomChoice([transforms.Grayscale(3), transforms.RandomSolarize(128, 1.0), blur])
    erasing = {mode: RandomErasing(0.25, mode=mode, device="cpu") for mode in ("pixel", "const")}
    floats = torch.zeros(3, size, size)  # timm erases normalised floats; making them is not counted
    return {
        "randaugment_timm": randaugment,
        "three_augment, color_jitter": transforms.Compose([one_of, jitter]),
        "color_jitter": jitter,
        "random_erasing, pixel": lambda _: erasing["pixel"](floats),
        "random_erasing, const": lambda _: erasing["const"](floats),
    }


def seconds(run: Callable[[], None]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def compare(
    policy: Policy, other: Augment, picture: Image.Image, images: int, rounds: int
) -> list[tuple[float, float]]:
    """Seconds an image of (ours, theirs) in each round."""
    pixels = np.array(picture)
    times = []
    for number in range(rounds):

        def ours(first: int = number * images) -> None:
            for start in range(first, first + images, 16):  # as many as a decode thread draws for at a time
                samples = np.arange(start, start + 16)
                for draws in policy.draws(samples, np.zeros_like(samples), np.zeros_like(samples)):
                    policy.apply(pixels, draws)

        def peers() -> None:
            for _ in range(images):
                other(picture)

        spent = {run: seconds(run) for run in ((ours, peers) if number % 2 else (peers, ours))}
        times.append((spent[ours] / images, spent[peers] / images))
    return times


@click.command()
@click.option(
    "--image",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A picture; by default smoothed noise.",
)
@click.option("--size", default=224, show_default=True, help="Pixels a side.")
@click.option("--images", default=160, show_default=True, help="Images in a round, a multiple of 16.")
@click.option("--rounds", default=7, show_default=True)
def main(image: Path | None, size: int, images: int, rounds: int) -> None:
    """Time every augmentation policy, and timm's and torchvision's of the same kind."""
    torch.set_num_threads(1)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    source = Image.open(image).convert("RGB") if image else noise
    picture = source.resize((size, size))
    model = ModelConfig(size="Ti", img_size=picture.size, patch_size=(1, 1), num_classes=2)
    peers = theirs(size)
    print(f"{'policy':28s} {'ours, ms':>9s} {'theirs, ms':>11s} {'theirs / ours':>14s}")
    for name, augment in OURS.items():
        policy = Policy(AugmentConfig.model_validate(augment), model, "bicubic", seed=0)
        times = compare(policy, peers.get(name, lambda _: None), picture, images, rounds)
        ours, other = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        ratios = sorted(b / a for a, b in times)
        told = f"{other:11.3f} {statistics.median(ratios):.2f} [{ratios[0]:.2f}..{ratios[-1]:.2f}]"
        print(f"{name:28s} {ours:9.3f} {told if name in peers else '          -'}")


if __name__ == "__main__":
    main()
