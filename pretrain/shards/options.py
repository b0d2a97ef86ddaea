"""Options that several commands have, and what one of them means."""

import os
from pathlib import Path
from typing import Any

import click


class _LocalPath(click.Path):
    """A URL would be taken for a folder `s3:` here."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        if "://" in str(value):
            self.fail(
                f"{value!a} is a URL; this command works on files: copy them from or to the store", param, ctx
            )
        return super().convert(value, param, ctx)


PATH = _LocalPath(path_type=Path)

workers = click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes that share the work.  [default: the cores that this job was given; fewer for little work]",
)
max_pixels = click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=89_478_485,
    show_default=True,
    help="An image whose header says more is bad, and is not decoded.",
)


def chosen(workers: int | None, images: int, num_bytes: int) -> int:
    """Workers as they were asked for, or as many as there are cores for, if there is work for them."""
    from pretrain.data.pool import worth_starting
    from pretrain.hardware import cores_given

    return workers or worth_starting(cores_given(), images, num_bytes)
