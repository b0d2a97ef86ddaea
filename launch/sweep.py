"""A sweep: one config with some keys set to each of several values, and a run directory for each combination.

SWEEP/, the config's run.dir
  sweep.json     its members and what differs between them, as last submitted
  best.json      the member with the best top-1 (`launch.best`)
  slurm/sweep/   the array's script, and the job that looks for the best one
  lr-0.01/       a member: a run directory like any other
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pretrain.config import Config, load
from pretrain.documents import number, read_object, whole, write_object
from pretrain.errors import ConfigError, RunDirError
from pretrain.run_dir import STATUS

MEMBERS, BEST = "sweep.json", "best.json"
MAX_MEMBERS = 1000
"""Slurm takes 1001 tasks of an array where the site has not said otherwise."""

MAX_NAME = 200
OWN = ("run.dir", "run.campaign", "tracking.run_name", "checkpoint.mirror")
"""Keys that a sweep sets for each member."""

_NAME = re.compile(r"\w[\w.]*-[A-Za-z0-9_.+-]+", re.ASCII)
"""Of a member's folder: never a way out of the sweep's."""


@dataclass(frozen=True)
class Member:
    """name: of its folder in the sweep's; values: key -> value, as they were typed."""

    name: str
    values: Mapping[str, str]
    config: Config


class Best(NamedTuple):
    """run: the member's name; top1, step: of its checkpoint."""

    run: str
    top1: float
    step: int


def members_of(path: Path, overrides: Sequence[str], over: Sequence[str]) -> list[Member]:
    """Every combination of the values, in the order given; raises `ConfigError` for what is no sweep.

    over: such as `optim.lr=0.003,0.01`; a comma within brackets belongs to the value.
    """
    axes = dict(_axis(text) for text in over)
    if len(axes) < len(over):
        raise ConfigError("--over names a key twice: give all of its values at once, separated by commas")
    total = 1
    for choices in axes.values():
        total *= len(choices)
    if not 2 <= total <= MAX_MEMBERS:
        raise ConfigError(f"a sweep has 2 to {MAX_MEMBERS} members, given values for {total}")
    short = _short_names(list(axes))
    found: list[Member] = []
    plain: list[Config] = []
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        config = load(path, [*overrides, *(f"{key}={value}" for key, value in values.items())])
        name = "_".join(f"{short[key]}-{_safe(value)}" for key, value in values.items())
        if config in plain or name in {member.name for member in found}:
            raise ConfigError(f"two members of the sweep are the same: {name}")
        plain.append(config)
        found.append(Member(name, values, _placed(config, name)))
    if any(config.data.val is None for config in plain):
        raise ConfigError(
            "the best member is the one with the best top-1 on data.val, which not every member has"
        )
    if len(max((member.name for member in found), key=len)) > MAX_NAME:
        raise ConfigError(
            f"the names of the members would have more than {MAX_NAME} letters: sweep over less"
        )
    return found


def write(sweep: Path, members: Sequence[Member]) -> None:
    """Note what the sweep consists of."""
    facts = [{"run": member.name, "values": dict(member.values)} for member in members]
    write_object(sweep / MEMBERS, {"members": facts})


def read(sweep: Path) -> list[tuple[str, dict[str, str]]]:
    """(name, values) of each member; raises `RunDirError` where there is no sweep."""
    try:
        found = read_object(sweep / MEMBERS).get("members")
        if not isinstance(found, list) or not found:
            raise ValueError(f"{MEMBERS} names no members")
        return [_member(one) for one in found]
    except (OSError, ValueError) as error:
        raise RunDirError(f"{sweep} is not the directory of a sweep: {error}") from None


def _member(facts: object) -> tuple[str, dict[str, str]]:
    match facts:
        case {"run": str(name), "values": dict(values)} if _NAME.fullmatch(name):
            return name, {str(key): str(value) for key, value in values.items()}
    raise ValueError(f"{MEMBERS} holds what is no member")


def read_best(sweep: Path) -> Best | None:
    """What `launch.best` found last, or None where there is nothing that can be read."""
    try:
        match read_object(sweep / BEST):
            case {"run": str(name), "top1": top1, "step": step} if _NAME.fullmatch(name):
                score, at = number(top1), whole(step)
                return None if score is None or at is None else Best(name, score, at)
    except (OSError, ValueError):
        pass
    return None


def check_place(sweep: Path) -> None:
    """Raise `RunDirError` where the sweep's own directory is a run."""
    if (sweep / STATUS).exists():
        raise RunDirError(f"{sweep} is a run by itself: give the sweep a run.dir of its own")


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    key = key.strip()
    found = [value.strip() for value in re.split(r",(?![^\[]*\])", values)]
    if not equals or not re.fullmatch(r"\w+(\.\w+)+", key, re.ASCII) or not all(found):
        raise ConfigError(
            f"--over {text!r}: write it as key.sub=value,value, for instance optim.lr=0.003,0.01"
        )
    if key in OWN:
        raise ConfigError(f"--over {key}: a sweep sets it for each of its members")
    return key, found


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or all of it where two end in the same word."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)}


def _safe(value: str) -> str:
    """A value as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", value)


def _placed(config: Config, name: str) -> Config:
    """The member's own directory, mirror and name in MLflow, below one parent that is the sweep's."""
    sweep = Path(config.run.dir)
    above = config.run.campaign or sweep.absolute().parent.name
    run = config.run.model_copy(
        update={"dir": str(sweep / name), "campaign": f"{above}/{sweep.absolute().name}"}
    )
    called = config.tracking.run_name
    tracking = config.tracking.model_copy(update={"run_name": None if called is None else f"{called}/{name}"})
    mirror = config.checkpoint.mirror
    own = None if mirror is None else f"{mirror.rstrip('/')}/{name}"
    checkpoint = config.checkpoint.model_copy(update={"mirror": own})
    return config.model_copy(update={"run": run, "tracking": tracking, "checkpoint": checkpoint})
