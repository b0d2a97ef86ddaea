"""Options that several commands have."""

from pathlib import Path

import click

PATH = click.Path(path_type=Path)

workers = click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes that share the work.  [default: the cores this one may use]",
)
max_pixels = click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=89_478_485,
    show_default=True,
    help="An image whose header says more is bad, and is not decoded.",
)
