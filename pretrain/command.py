"""How a command of ours ends: one place for exit codes and for what is shown of an error.

done                      0, or the number that the command returned
the user's mistake        `UserError.exit_code`, the message alone on stderr; the traceback with --debug
wrong use of the command  2, click's own message
Ctrl-C                    130, in silence
a bug of ours             1, with its traceback

Secrets are taken out of all of it.
"""

import gc
import io
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

import click

from pretrain import logs
from pretrain.errors import UserError
from pretrain.redact import redact_text
from pretrain.world import World

DEBUG = "--debug"
INTERRUPTED = 130  # 128 + SIGINT, what a shell reports

debug_option = click.option(
    DEBUG, is_flag=True, expose_value=False, help="Show the traceback of an error; may stand anywhere."
)
"""For the help of a group of commands: `run` takes it out before click sees it."""


def run(command: click.Command, name: str) -> NoReturn:
    """Run `command` on the process's arguments and exit. `--debug` is taken out wherever it stands."""
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
    debug = len(arguments) < len(sys.argv[1:])
    sys.excepthook = _show_bug
    try:
        result = command.main(arguments, prog_name=name, standalone_mode=False)
    except UserError as error:
        click.echo(redact_text(traceback.format_exc() if debug else f"Error: {error}"), err=True)
        _leave(error.exit_code)
    except click.ClickException as error:
        words = io.StringIO()
        error.show(words)
        click.echo(redact_text(words.getvalue()), nl=False, err=True)
        _leave(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _leave(INTERRUPTED)
    _leave(result if isinstance(result, int) else 0)


def _leave(code: int) -> NoReturn:
    """End the process without the search through every object of torch that the interpreter would make before: a second of
    a processor for each rank, while a job that is to start again waits for them."""
    gc.freeze()
    sys.exit(code)


def _show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    click.echo(redact_text("".join(traceback.format_exception(kind, error, trace))), nl=False, err=True)


@contextmanager
def one_speaker(place: World) -> Iterator[None]:
    """Let rank 0 alone log to stderr and show errors, also those of other ranks, which it hears of. All ranks.

    Before the ranks have met it hears of none: then the first process of each machine speaks, since what is wrong there
    may be right elsewhere.
    """
    if place.is_main:
        logs.to_stderr()
    try:
        yield
    except UserError as error:
        if place.is_main or (place.local_rank == 0 and not error.is_shared):
            raise
        sys.exit(error.exit_code)
