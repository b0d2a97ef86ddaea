"""`pretrain shards`: make shards, index those that others made, check them, look at them, mend them."""

import click

from pretrain.shards.make import index, pack


@click.group()
def shards() -> None:
    """Make, index, check, describe and mend WebDataset shards."""


for _command in (pack, index):
    shards.add_command(_command)
