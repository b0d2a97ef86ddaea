"""The same work by other libraries, as their own documentation would have it done: random crop, bilinear, mirror, batch.

`cores` is the number of DataLoader workers, or of DALI's threads. Shards are local files, shuffled as each library does.
"""

import io
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pretrain.bench.contenders import Setting, Work
from pretrain.bench.ours import MEAN, STD

_FOREVER = 10**7


def _webdataset(setting: Setting, transform: Callable[[bytes], torch.Tensor]) -> Iterator[Work]:
    import webdataset as wds

    # Enough copies for each worker to have a shard: webdataset shares out whole shards, and fewer would leave some idle.
    urls = list(setting.paths) * setting.cores
    data = (
        wds.WebDataset(urls, shardshuffle=100, resampled=False)
        .shuffle(1000)
        .to_tuple("jpg;png;webp;jpeg", "cls")  # never its `decode`, which would run pickles in the shards
        .map_tuple(transform, int)
        .batched(setting.batch, partial=False)
        .repeat()
    )
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=setting.cores)
    for images, _ in loader:
        yield Work(len(images))


def webdataset_pil(setting: Setting) -> Iterator[Work]:
    """The recipe that most people run: PIL, ToTensor, Normalize."""
    from PIL import Image
    from torchvision import transforms

    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(setting.size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([MEAN / 255] * 3, [STD / 255] * 3),
        ]
    )

    def transform(data: bytes) -> torch.Tensor:
        found: torch.Tensor = view(Image.open(io.BytesIO(data)).convert("RGB"))
        return found

    return _webdataset(setting, transform)


def webdataset_v2(setting: Setting) -> Iterator[Work]:
    """torchvision's own JPEG decoder and its transforms v2, uint8 to the end."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    crop = v2.Compose([v2.RandomResizedCrop(setting.size, antialias=True), v2.RandomHorizontalFlip()])

    def transform(data: bytes) -> torch.Tensor:
        pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        view: torch.Tensor = crop(decode_image(pixels, ImageReadMode.RGB))
        return view

    return _webdataset(setting, transform)


def _timm(setting: Setting) -> Any:
    from timm.data import create_dataset, create_loader

    # timm puts together root and names; one folder of links takes any list of paths, once for each worker.
    folder = Path(tempfile.mkdtemp(dir=setting.scratch))
    for number, path in enumerate(setting.paths * setting.cores):
        (folder / f"link-{number:06d}.tar").symlink_to(Path(path).resolve())
    last = len(setting.paths) * setting.cores - 1
    split = f"link-{{000000..{last:06d}}}.tar|{_FOREVER}"
    dataset = create_dataset(
        "wds/", root=str(folder), split=split, is_training=True, batch_size=setting.batch
    )
    return create_loader(
        dataset,
        input_size=(3, setting.size, setting.size),
        batch_size=setting.batch,
        is_training=True,
        interpolation="bilinear",
        color_jitter=None,  # timm's word for none
        mean=(MEAN / 255,) * 3,
        std=(STD / 255,) * 3,
        num_workers=setting.cores,
        device=torch.device("cpu"),
    )


def timm_float(setting: Setting) -> Iterator[Work]:
    """timm's loader: its PrefetchLoader normalises in the consumer."""
    torch.set_num_threads(1)
    for images, _ in _timm(setting):
        yield Work(len(images))


def timm_uint8(setting: Setting) -> Iterator[Work]:
    """What lies below that: its dataset, transforms and fast_collate."""
    for images, _ in itertools.chain.from_iterable(itertools.repeat(_timm(setting).loader)):
        yield Work(len(images))


def _dali(setting: Setting, normalise: bool) -> Iterator[Work]:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=setting.batch, num_threads=setting.cores, device_id=None, prefetch_queue_depth=2, seed=0
    )
    def pipeline() -> Any:
        files, _ = fn.readers.webdataset(
            paths=list(setting.paths),
            ext=["jpg;png;webp;jpeg", "cls"],
            random_shuffle=True,
            initial_fill=1000,
            missing_component_behavior="error",
        )
        images = fn.decoders.image_random_crop(files, device="cpu", random_area=[0.08, 1.0])
        images = fn.resize(
            images, size=[setting.size, setting.size], interp_type=types.INTERP_LINEAR, antialias=True
        )
        mirrored = fn.random.coin_flip()
        if not normalise:
            return fn.flip(images, horizontal=mirrored)
        return fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="CHW", mean=[MEAN] * 3, std=[STD] * 3, mirror=mirrored
        )

    running = pipeline()
    running.build()
    while True:
        (images,) = running.run()
        images.as_array()
        yield Work(len(images))


def dali_uint8(setting: Setting) -> Iterator[Work]:
    return _dali(setting, normalise=False)


def dali_float(setting: Setting) -> Iterator[Work]:
    return _dali(setting, normalise=True)
