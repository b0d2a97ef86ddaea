"""`pretrain shards repair`: the same shards without their bad samples."""

from pathlib import Path

import click

from pretrain.redact import printable
from pretrain.shards import options
from pretrain.shards.bars import bar

_SHOWN = 20


@click.command()
@click.argument("folder", type=options.PATH)
@click.argument("out", type=options.PATH)
@click.option(
    "--report",
    "reports",
    type=options.PATH,
    multiple=True,
    required=True,
    help="JSON lines of bad samples: of `verify --json`, or a run's quarantine.jsonl. May be given again.",
)
@options.workers
def repair(folder: Path, out: Path, reports: tuple[Path, ...], workers: int | None) -> None:
    """Write the shards of FOLDER to OUT, a new folder, without the samples that the reports name.

    Shards keep their names, what is left is copied byte for byte, and FOLDER stays as it is.
    """
    from pretrain.data.manifest import read_manifest
    from pretrain.data.repair import repair_folder

    before = read_manifest(folder)
    with bar(len(before.shards), "shards", "copying") as shown:
        done = repair_folder(
            folder, out, reports, workers=options.chosen(workers, 0, before.bytes), on_shard=shown.update
        )
    for note in done.notes:
        click.echo(printable(f"about a shard as a whole, so nothing was left out for it: {note}"))
    for dropped in done.dropped[:_SHOWN]:
        words = f"left out: {dropped.shard}, sample {dropped.sample} ({dropped.key}): {dropped.reason}"
        click.echo(printable(words))
    if len(done.dropped) > _SHOWN:
        click.echo(f"... and {len(done.dropped) - _SHOWN:,} more")
    for name in done.emptied:
        click.echo(f"left out whole, no sample of it is good: {name}")
    click.echo(
        f"{out}: {done.manifest.samples:,} of {before.samples:,} samples, digest {done.manifest.digest[:12]}\n"
        f"Next: name the folder in a config; it is another data set than {folder}, so start a new run:\n"
        f"  data.train.shards: {out}"
    )
