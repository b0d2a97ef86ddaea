"""`pretrain shards verify` and `stats`: what is wrong with shards, and what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pretrain.redact import printable
from pretrain.shards import options
from pretrain.shards.bars import bar, counter

if TYPE_CHECKING:
    from rich.table import Table

    from pretrain.data.stats import Stats
    from pretrain.data.verify import Report

_MIB = 2**20
_SHOWN = 50
_PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


@click.command()
@click.argument("folder", type=options.PATH)
@click.option("--fast", is_flag=True, help="Only sizes and hashes of tars and indexes; no sample is decoded.")
@click.option("--num-classes", type=click.IntRange(min=1), help="Labels must be below this, too.")
@options.max_pixels
@click.option("--json", "as_json", is_flag=True, help="A JSON line for each problem, for `repair`; no table.")
@options.workers
@click.pass_context
def verify(
    context: click.Context,
    folder: Path,
    fast: bool,
    num_classes: int | None,
    max_pixels: int,
    as_json: bool,
    workers: int | None,
) -> None:
    """Check the shards of FOLDER against their manifest, and decode every sample.

    Found are: tars and indexes that are missing, of another size or another content; samples whose bytes have changed
    or are cut short, that have no image, no label or a label out of range, or a key that another has; images that
    cannot be decoded. Exits with 1 if there is anything.
    """
    from pretrain.data.manifest import read_manifest
    from pretrain.data.verify import verify_folder

    manifest = read_manifest(folder)
    with bar(manifest.samples, "images", "verifying") as shown:
        report = verify_folder(
            folder,
            max_pixels=max_pixels,
            num_classes=num_classes,
            fast=fast,
            workers=options.chosen(workers, 0 if fast else manifest.samples, manifest.bytes),
            on_samples=shown.update,
            on_shard=counter(shown, len(manifest.shards)),
        )
    if as_json:
        for problem in report.problems:
            click.echo(json.dumps(problem._asdict()))
    else:
        _show_problems(folder, report, fast)
    if report.problems:
        context.exit(1)


@click.command()
@click.argument("folder", type=options.PATH)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=100_000,
    show_default=True,
    help="Look at this many samples in even steps; at all, if there are fewer.",
)
@click.option(
    "--figure", type=options.PATH, help="Draw it, too: a PNG, or another ending that matplotlib knows."
)
@options.max_pixels
@options.workers
def stats(folder: Path, sample: int, figure: Path | None, max_pixels: int, workers: int | None) -> None:
    """Describe the shards of FOLDER: classes, image sizes, bytes, formats. No image is decoded."""
    from rich.console import Console

    from pretrain.data.figure import draw
    from pretrain.data.manifest import read_manifest
    from pretrain.data.stats import describe_folder
    from pretrain.errors import DataError

    manifest = read_manifest(folder)
    count = min(sample, manifest.samples)
    with bar(count, "images", "looking") as shown:
        found = describe_folder(
            folder,
            sample=sample,
            max_pixels=max_pixels,
            workers=options.chosen(workers, count, manifest.bytes * count // manifest.samples),
            on_samples=shown.update,
        )
    console = Console()
    click.echo(
        f"{folder}: {found.samples:,} samples in {found.shards:,} shards, {found.bytes / _MIB:,.1f} MiB"
        + ("" if found.looked_at == found.samples else f"; of {found.looked_at:,} of them in even steps:")
    )
    for table in (_classes(found), _sizes(found), _kinds(found)):
        console.print(table)
    if figure is not None:
        try:
            draw(found, folder.resolve().name, figure)
        except (OSError, ValueError) as error:
            raise DataError(f"{figure}: cannot be written: {error}") from None
        click.echo(f"drawn: {figure}")


def _show_problems(folder: Path, report: Report, fast: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    size = f"{report.shards:,} shards, {report.bytes / _MIB:,.1f} MiB"
    what = "sizes and hashes only" if fast else f"{report.samples:,} samples decoded"
    if report.ignored:
        others = ", ".join(f"{printable(suffix)} ({n:,})" for suffix, n in report.ignored.most_common(5))
        click.echo(f"members that training does not look at: {others}")
    if not report.problems:
        click.echo(f"{folder}: {size}: all is well ({what})")
        return
    table = Table("shard", "sample", "key", "what is wrong", title=f"{len(report.problems):,} problems")
    for problem in report.problems[:_SHOWN]:
        number = "" if problem.sample is None else str(problem.sample)
        table.add_row(*map(_plain, (problem.shard, number, problem.key or "", problem.reason)))
    Console().print(table)
    if len(report.problems) > _SHOWN:
        click.echo(f"... and {len(report.problems) - _SHOWN:,} more; --json lists all")
    click.echo(f"{folder}: {size}: {len(report.problems):,} problems ({what})")
    click.echo(
        "Next: bring damaged files back from their source, or leave bad samples out:\n"
        f"  pretrain shards verify {folder} --json > bad.jsonl\n"
        f"  pretrain shards repair {folder} NEW_FOLDER --report bad.jsonl"
    )


def _plain(text: str) -> str:
    """Text from a shard for a table: nothing that rich would take for markup either."""
    from rich.markup import escape

    return escape(printable(text))


def _classes(found: Stats) -> Table:
    import numpy as np
    from rich.table import Table

    counts = found.per_class
    order = np.argsort(-counts, kind="stable")
    table = Table("", "", title="classes")
    table.add_row("classes", f"{len(counts):,}")
    table.add_row("without an image", f"{int((counts == 0).sum()):,}")
    if found.beyond:
        table.add_row("images whose label is none of them", f"{found.beyond:,}")
    table.add_row("images of a class: fewest, median, most", _three(counts))
    for what, labels in (("largest", order[:5]), ("smallest", order[::-1][:5])):
        named = ", ".join(f"{_plain(found.name(int(i)))} ({int(counts[i]):,})" for i in labels)
        table.add_row(what, named)
    return table


def _three(counts: object) -> str:
    import numpy as np

    return ", ".join(f"{value:,.0f}" for value in np.percentile(np.asarray(counts), (0, 50, 100)))


def _sizes(found: Stats) -> Table:
    import numpy as np
    from rich.table import Table

    seen = found.seen.table
    table = Table("percentile", *(f"{p}" for p in _PERCENTILES), title="images as stored")
    rows = {
        "width": seen["width"],
        "height": seen["height"],
        "megapixels": seen["width"] * seen["height"] / 1e6,
        "KiB": seen["bytes"] / 1024,
    }
    for name, values in rows.items():
        digits = 0 if name in ("width", "height") else 2
        table.add_row(name, *(f"{value:,.{digits}f}" for value in np.percentile(values, _PERCENTILES)))
    return table


def _kinds(found: Stats) -> Table:
    from rich.table import Table

    table = Table("format", "mode", "images", title="formats")
    for (form, mode), count in found.seen.kinds.most_common():
        table.add_row(form, mode, f"{count:,}")
    if found.seen.bad:
        table.add_row("none", "", f"{found.seen.bad:,}")
    return table
