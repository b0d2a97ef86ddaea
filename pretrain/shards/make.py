"""`pretrain shards pack` and `index`: from images to shards, and from anybody's tars to shards we can seek in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pretrain.shards import options
from pretrain.shards.bars import bar, counter

if TYPE_CHECKING:
    from pretrain.data.manifest import Manifest

_MIB = 2**20


@click.command()
@click.argument("source", type=options.PATH)
@click.argument("out", type=options.PATH)
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
    help="Content of a shard in MiB, as SOURCE holds it, in place of --shards.  [default: 256]",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of order and split."
)
@click.option(
    "--label-map", type=options.PATH, help="Index of each class name: JSON object, or CSV of name,index."
)
@click.option(
    "--root", type=options.PATH, help="Folder that the paths of a table start from, and may not leave."
)
@click.option("--image-column", default="image", show_default=True, help="Of parquet files with images.")
@click.option("--label-column", default="label", show_default=True, help="Of parquet files with images.")
@click.option(
    "--longest-side",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="Shrink images that are larger to this.",
)
@click.option(
    "--quality",
    type=click.IntRange(1, 100),
    default=90,
    show_default=True,
    help="Of JPEG and WebP that are shrunk; other images are stored as they are.",
)
@options.max_pixels
@click.option("--skip-bad", is_flag=True, help="Leave out what is no image, and list it in skipped.jsonl.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@options.workers
def pack(source: Path, out: Path, workers: int | None, overwrite: bool, seed: int, **given: Any) -> None:
    """Pack the images of SOURCE into shards below OUT, with index and manifest.

    SOURCE is a folder of images by class (CLASS/*.jpg, png or webp), the same below train/ and val/; MNIST's or
    Fashion-MNIST's four idx files; a .csv or .parquet table with columns path and label, and if it likes split and
    key; or parquet files that hold the images, as Hugging Face's do. OUT gets train/ and val/.

    Stopped half-way, the same command goes on where it was.
    """
    if given["count"] is not None and given["shard_size"] is not None:
        raise click.UsageError("give --shards or --shard-size, not both")

    from pretrain.data import pack as packing

    columns = packing.Columns(given["image_column"], given["label_column"])
    found = packing.open_source(source, packing.Options(given["root"], given["label_map"], columns))
    total = sum(map(len, found.splits.values()))
    size = sum(item.content.size for items in found.splits.values() for item in items)
    with (
        bar(total if found.parts else 0, "images", "unpacking") as unpacked,
        bar(total, "images", "packing") as shown,
    ):
        packed = packing.pack(
            found,
            out,
            val_share=given["val_share"],
            size=packing.ShardSize(given["count"], round((given["shard_size"] or 256) * _MIB)),
            seed=seed,
            encoding=packing.Encoding(
                given["longest_side"], given["quality"], given["max_pixels"], given["skip_bad"]
            ),
            overwrite=overwrite,
            workers=options.chosen(workers, total, size),
            on_unpacked=unpacked.update,
            on_images=shown.update,
            on_shard=counter(shown),
        )
    kept = sum(split.kept for split in packed.values())
    if kept:
        click.echo(
            f"{kept:,} shards were there from an attempt that had ended early; they were checked and kept."
        )
    for split, done in packed.items():
        _report(str(out / split), done.manifest)
        if done.skipped:
            click.echo(f"{done.skipped:,} bad images were left out: see {out / split / packing.SKIPPED}")
    click.echo("Next: name these folders in a config:")
    for split in packed:
        click.echo(f"  data.{split}.shards: {out / split}")


@click.command()
@click.argument("source")
@click.option("--verify", is_flag=True, help="Read every tar again, whatever its index says.")
@click.option(
    "--out", type=options.PATH, help="Of tars in a store: a folder for the indexes and the manifest."
)
@options.workers
def index(source: str, verify: bool, out: Path | None, workers: int | None) -> None:
    """Write the index of every *.tar in SOURCE, and their manifest.

    For WebDataset shards that were made elsewhere, or that were changed on purpose. SOURCE is a folder, a URL of one, or
    a pattern of URLs. Of a folder, class names that its manifest already gives are kept, and a tar that is older than
    its index, and of the size it says, is not read again. Tars in a store are read once and stay where they are; stopped
    half-way, the same command goes on where it was.
    """
    from pretrain.data.urls import is_remote

    if is_remote(source):
        if verify:
            raise click.UsageError(
                "--verify is about tars in a folder; those in a store are known by their etags"
            )
        _index_remote(source, out, workers)
        return
    if out is not None:
        raise click.UsageError("--out is about tars in a store; in a folder the indexes lie beside the tars")
    from pretrain.data.scan import index_folder, known_class_names
    from pretrain.errors import DataError

    folder = Path(source)
    try:
        tars = list(folder.glob("*.tar"))
        num_bytes = sum(tar.stat().st_size for tar in tars if tar.is_file())
        class_names = known_class_names(folder)
    except OSError as error:  # a folder that this user may not enter
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None
    with bar(len(tars), "shards", "indexing") as shown:
        manifest = index_folder(
            folder,
            class_names,
            on_shard=lambda _: shown.update(),
            workers=options.chosen(workers, 0, num_bytes),
            verify=verify,
        )
    _report(str(folder), manifest)
    click.echo(f"Next: name the folder in a config:\n  data.train.shards: {folder}")


def _index_remote(source: str, out: Path | None, workers: int | None) -> None:
    from pretrain.data.contact import copy_indexes, find_objects_of, index_found

    found = find_objects_of(source)
    with bar(len(found.jobs), "shards", "indexing") as shown:
        manifest = index_found(
            found, options.chosen(workers, 0, found.num_bytes), on_shard=lambda _: shown.update()
        )
    _report(found.folder, manifest)
    if out is None:
        click.echo(
            f"Next: name it in a config, on machines that see {found.place}:\n  data.train.shards: {source}"
        )
        return
    copy_indexes(found, out)
    click.echo(f"Next: copy the files of {out} to {found.folder}, and name that in a config:")
    click.echo(f"  data.train.shards: {found.folder}")


def _report(folder: str, manifest: Manifest) -> None:
    click.echo(
        f"{folder}: {manifest.samples:,} samples in {len(manifest.shards):,} shards, "
        f"{manifest.bytes / _MIB:,.1f} MiB, labels {manifest.min_label} to {manifest.max_label} "
        f"({'named' if manifest.class_names else 'without names'}), "
        f"digest {manifest.digest[:12]}"
    )
