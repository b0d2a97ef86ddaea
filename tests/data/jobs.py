"""Tasks for worker processes, in a module that is imported in no time."""

import os
import signal

from pretrain.data.pool import Advance
from pretrain.errors import DataError


def square(number: int, advance: Advance) -> int:
    advance(number)
    if number == 7:
        raise DataError("seven is bad")
    return number * number


def die(number: int, advance: Advance) -> None:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def bug(number: int, advance: Advance) -> None:
    raise ZeroDivisionError(number)
