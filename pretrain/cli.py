"""The `pretrain` command: a table of subcommands, each imported only when it is called.

`pretrain --help` and `pretrain COMMAND --help` answer at once, so a command's module imports torch, deepspeed,
mlflow and webdataset inside its functions. Training itself is started by a launcher, see `pretrain.train`.
"""

import importlib
from typing import NamedTuple

import click

from pretrain import __version__, command


class Lazy(NamedTuple):
    """Where a subcommand lives, as module:attribute, and its line in the table of commands."""

    target: str
    summary: str


COMMANDS = {
    "plan": Lazy(
        "pretrain.plan:plan", "Show what a config resolves to and what it needs, before it is queued."
    ),
    "shards": Lazy(
        "pretrain.shards:shards", "Pack images into WebDataset shards; index, check, describe, mend shards."
    ),
    "evaluate": Lazy(
        "pretrain.evaluate:evaluate", "Measure a checkpoint of a run on the whole validation set."
    ),
    "export": Lazy("pretrain.export:export", "Write a checkpoint in a form that other libraries load."),
    "import": Lazy(
        "pretrain.importing:import_", "Make weights of another library into a start for training."
    ),
    "predict": Lazy("pretrain.predict:predict", "Classify images by an export."),
    "show": Lazy("pretrain.show:show", "Draw what a model has learnt: positions, filters, attention."),
    "bench": Lazy("pretrain.bench:bench", "Measure the input pipeline, beside its limit and its peers."),
    "track": Lazy("pretrain.track:track", "Deliver to MLflow what a run could not deliver itself."),
}


class LazyGroup(click.Group):
    """A group that knows its subcommands by name and imports none before it is asked for it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name].target.split(":")
        found = getattr(importlib.import_module(module), attribute)
        assert isinstance(found, click.Command), COMMANDS[name].target
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.summary) for name, lazy in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Training is started by a launcher: "
    "accelerate launch --config_file launch/single_node.yaml -m pretrain.train CONFIG",
)
@click.version_option(__version__, prog_name="pretrain")
@command.debug_option
def pretrain() -> None:
    """Pretrain Vision Transformers on WebDataset shards: plan, pack, evaluate, export."""


def main() -> None:
    """The entry point of the installed command and of `python -m pretrain`."""
    command.run(pretrain, "pretrain")
