"""Faults on purpose: what a test, or somebody who wants to see it, makes go wrong in a run.

    PRETRAIN_FAULT="write:1:40:ENOSPC" accelerate launch ... -m pretrain.train configs/mine.yaml

is `point:rank:step:kind`: at this point of the program, on this rank, the first time that it is reached at this step or
later, once. Off unless the variable is set; no config can set it. See docs/faults.md for the points.
"""

import errno
import os
import signal
import sys
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from pretrain.errors import ConfigError

VARIABLE = "PRETRAIN_FAULT"

Point = Literal[
    "data", "step", "update", "evaluate", "save", "write", "commit", "manifest", "rename", "latest", "track"
]
Kind = Literal["SIGKILL", "SIGSTOP", "exception", "NaN", "ENOSPC", "EIO"]

POINTS: tuple[Point, ...] = get_args(Point)
KINDS: tuple[Kind, ...] = get_args(Kind)
NAN_POINTS: tuple[Point, ...] = ("step",)
ON_RANK_0: tuple[Point, ...] = ("manifest", "rename", "latest", "track")


class InjectedError(RuntimeError):
    """What the kind `exception` raises: an error that nobody expects."""


class Fault(NamedTuple):
    point: Point
    rank: int
    step: int
    kind: Kind


_armed: Fault | None = None
_now = 0


def parse(text: str) -> Fault:
    """The fault that a value of the variable names; raises `ConfigError` for one that could never happen."""
    point, *rest = text.split(":")
    try:
        rank, step, kind = int(rest[0]), int(rest[1]), rest[2]
        if len(rest) != 3 or point not in POINTS or kind not in KINDS or min(rank, step) < 0:
            raise ValueError
    except (ValueError, IndexError):
        raise ConfigError(
            f"{VARIABLE}={text!r} is not point:rank:step:kind with a point of {', '.join(POINTS)} "
            f"and a kind of {', '.join(KINDS)}"
        ) from None
    fault = Fault(point, rank, step, kind)
    if kind == "NaN" and point not in NAN_POINTS:
        raise ConfigError(f"{VARIABLE}={text!r}: NaN is for {', '.join(NAN_POINTS)}")
    if rank > 0 and point in ON_RANK_0:
        raise ConfigError(f"{VARIABLE}={text!r}: only rank 0 comes past {point}")
    return fault


def arm(environment: Mapping[str, str], rank: int) -> None:
    """Take in what the environment asks for, if it is for this rank. Called once by a program that can fail so."""
    global _armed
    fault = parse(environment[VARIABLE]) if VARIABLE in environment else None
    _armed = fault if fault is not None and fault.rank == rank else None


def at(point: Point, step: int | None = None) -> bool:
    """Let happen what was asked for at this point. Returns whether the caller shall compute with a NaN.

    step: of the run; None where the caller does not know it: that of the last `step`.
    """
    if _armed is None:
        return False
    return _happen(_armed, point, step)


def _happen(fault: Fault, point: Point, step: int | None) -> bool:
    global _armed, _now
    if point == "step" and step is not None:
        _now = step
    if point != fault.point or (_now if step is None else step) < fault.step:
        return False
    _armed = None
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"injected fault: {fault}\n".encode())
    match fault.kind:
        case "SIGKILL" | "SIGSTOP":
            os.kill(os.getpid(), signal.Signals[fault.kind])
        case "ENOSPC" | "EIO":
            number = getattr(errno, fault.kind)
            raise OSError(number, os.strerror(number), f"injected at {point}")
        case "exception":
            raise InjectedError(f"injected at {point}")
    return fault.kind == "NaN"
