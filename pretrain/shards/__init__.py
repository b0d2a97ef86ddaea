"""`pretrain shards`: make shards, index those that others made, check them, look at them, mend them."""

import click

from pretrain.shards.look import stats, verify
from pretrain.shards.make import index, pack
from pretrain.shards.mend import repair


@click.group()
def shards() -> None:
    """Make, index, check, describe and mend WebDataset shards."""


for _command in (pack, index, verify, stats, repair):
    shards.add_command(_command)
