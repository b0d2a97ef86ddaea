"""`pretrain shards`: make shards from images, and index shards that others made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pretrain.data.manifest import Manifest

_MIB = 2**20


@click.group()
def shards() -> None:
    """Make and index WebDataset shards."""


@shards.command("pack")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--val-share",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of the images that goes to val, for a source that is not split; by a hash of the key.",
)
@click.option("--shards", "count", type=click.IntRange(min=1), help="Number of shards of each split.")
@click.option(
    "--shard-size",
    type=click.FloatRange(0, min_open=True),
    metavar="MIB",
    help="Content of a shard in MiB, in place of --shards.  [default: 256]",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of order and split."
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
def pack_command(
    source: Path,
    out: Path,
    val_share: float,
    count: int | None,
    shard_size: float | None,
    seed: int,
    overwrite: bool,
) -> None:
    """Pack the images of SOURCE into shards below OUT, with index and manifest.

    SOURCE is a folder of images by class (CLASS/*.jpg, png or webp), the same below train/ and val/, or MNIST's or
    Fashion-MNIST's four idx files. OUT gets train/ and val/.
    """
    if count is not None and shard_size is not None:
        raise click.UsageError("give --shards or --shard-size, not both")

    from tqdm import tqdm

    from pretrain.data.pack import ShardSize, open_source, pack

    found = open_source(source)
    size = ShardSize(count, round((shard_size or 256) * _MIB))
    with tqdm(total=sum(map(len, found.splits.values())), unit=" images", desc="packing") as bar:
        manifests = pack(
            found, out, val_share=val_share, size=size, seed=seed, overwrite=overwrite, on_sample=bar.update
        )
    for split, manifest in manifests.items():
        _report(out / split, manifest)
    click.echo("Next: name these folders in a config:")
    for split in manifests:
        click.echo(f"  data.{split}.shards: {out / split}")


@shards.command("index")
@click.argument("folder", type=click.Path(path_type=Path))
def index_command(folder: Path) -> None:
    """Write the index of every *.tar in FOLDER, and their manifest.

    For WebDataset shards that were made elsewhere, or that were changed on purpose. Class names that FOLDER's
    manifest already gives are kept.
    """
    from tqdm import tqdm

    from pretrain.data.scan import index_folder, known_class_names

    with tqdm(total=len(list(folder.glob("*.tar"))), unit=" shards", desc="indexing") as bar:
        manifest = index_folder(folder, known_class_names(folder), on_shard=lambda _: bar.update())
    _report(folder, manifest)
    click.echo(f"Next: name the folder in a config:\n  data.train.shards: {folder}")


def _report(folder: Path, manifest: Manifest) -> None:
    click.echo(
        f"{folder}: {manifest.samples:,} samples in {len(manifest.shards):,} shards, "
        f"{manifest.bytes / _MIB:,.1f} MiB, labels {manifest.min_label} to {manifest.max_label} "
        f"({'named' if manifest.class_names else 'without names'}), "
        f"digest {manifest.digest[:12]}"
    )
