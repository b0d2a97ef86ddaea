"""Who takes part: a name, what it needs, what kind of batch it hands over, and how its process makes it."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """What all contenders are given. paths: the tars, as listed; images: of a round; scratch: a folder for anything; pace: images
    per second that the paced loop takes, none for no such loop."""

    paths: tuple[str, ...]
    shards: str
    size: int
    batch: int
    cores: int
    images: int
    scratch: str
    pace: float = 0


class Work(NamedTuple):
    """What one `next` of a feed did: images, and seconds of named parts of it."""

    images: int
    parts: dict[str, float] = {}  # noqa: RUF012 - a named tuple's default


Feed = Iterator[Work]


class Contender(NamedTuple):
    """target: module:function that makes a `Feed`; wire: what it hands over; needs: packages."""

    target: str
    wire: str
    needs: tuple[str, ...] = ()
    times: int = 1
    """It gets so many times the cores of the others."""


OURS, TWICE, OURS_FLOAT, STAGES, LOCK = "ours", "ours, twice the cores", "ours, normalised", "stages", "lock"
PACED = "paced"

CONTENDERS = {
    OURS: Contender("ours:threads", "uint8"),
    "ours, processes": Contender("ours:processes", "uint8"),
    "ours, pictures whole": Contender("ours:whole_pictures", "uint8", ("pretrain.data._jpegbox",)),
    TWICE: Contender("ours:threads", "uint8", times=2),
    STAGES: Contender("stages:stages", "parts"),
    LOCK: Contender("stages:lock", "parts", times=2),
    PACED: Contender("ours:paced", "parts", times=2),
    "webdataset, torchvision v2": Contender("peers:webdataset_v2", "uint8", ("torchvision", "webdataset")),
    "timm's reader": Contender("peers:timm_uint8", "uint8", ("timm", "webdataset")),
    "DALI": Contender("peers:dali_uint8", "uint8", ("nvidia.dali",)),
    OURS_FLOAT: Contender("ours:normalised", "float32"),
    "webdataset, torchvision on PIL": Contender("peers:webdataset_pil", "float32", ("torchvision", "webdataset")),
    "timm's loader": Contender("peers:timm_float", "float32", ("timm", "webdataset")),
    "DALI, normalised": Contender("peers:dali_float", "float32", ("nvidia.dali",)),
}  # fmt: skip


def chosen(peers: bool, only: tuple[str, ...], cores: int, usable: int, *, paced: bool = False) -> list[str]:
    """Names of those that can take part on `usable` cores; raises `ConfigError` for an unknown one."""
    unknown = [name for name in only if name not in CONTENDERS]
    if unknown:
        raise ConfigError(
            f"--only {unknown[0]!r}: there is no such contender; one of: {', '.join(CONTENDERS)}"
        )
    if paced:
        _require_room(only, cores, usable)
    missing = {name: _missing(name, peers, cores, usable, paced=paced) for name in CONTENDERS}
    left_out = [name for name in only if missing[name]]
    if left_out:
        raise ConfigError(
            f"--only {left_out[0]!r} cannot take part: it needs {', '.join(missing[left_out[0]])}"
        )
    return [name for name in CONTENDERS if not missing[name] and (name in only or not only)]


def _missing(name: str, peers: bool, cores: int, usable: int, *, paced: bool) -> list[str]:
    """What keeps a contender out; nothing where it can take part."""
    contender = CONTENDERS[name]
    missing = ["--pace"] if name == PACED and not paced else []
    if cores * contender.times > usable:
        missing.append(f"{cores * contender.times} cores of the {usable} that there are")
    missing += [f"{package} installed" for package in contender.needs if not _is_installed(package)]
    return missing + (["--peers"] if contender.target.startswith("peers:") and not peers else [])


def _require_room(only: tuple[str, ...], cores: int, usable: int) -> None:
    if only and PACED not in only:
        raise ConfigError(
            f"--pace measures the contender {PACED!r}, which --only leaves out: add --only {PACED}"
        )
    if cores * CONTENDERS[PACED].times > usable:
        raise ConfigError(
            f"--pace needs {cores * CONTENDERS[PACED].times} cores, {cores} for data and as many for the step loop; "
            f"there are {usable}: choose fewer --cores"
        )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package above it
        return False


def feed(name: str, setting: Setting) -> Feed:
    """Make the feed of a contender; in its own process."""
    module, function = CONTENDERS[name].target.split(":")
    make: Callable[[Setting], Feed] = getattr(importlib.import_module(f"pretrain.bench.{module}"), function)
    return make(setting)
