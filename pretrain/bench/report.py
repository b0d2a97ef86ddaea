"""The tables of `pretrain bench data`."""

import math
from collections.abc import Callable
from statistics import median

import click
from rich.console import Console
from rich.table import Table

from pretrain.bench.contenders import CONTENDERS, LOCK, OURS, OURS_FLOAT, PACED, STAGES, TWICE, Setting
from pretrain.bench.rounds import Measured
from pretrain.data.decode import decoder

ByName = dict[str, list[Measured]]
_STAGES = ("read", "decode", "augment")
_COMMON_RATE = 2000.0


def show(measured: ByName, setting: Setting, rate: float | None) -> None:
    console = Console(width=120)
    for wire, references in (("uint8", (OURS,)), ("float32", (OURS_FLOAT, OURS))):
        if any(CONTENDERS[name].wire == wire for name in measured):
            known = [name for name in references if name in measured]
            console.print(_table(measured, wire, known, setting))
    if STAGES in measured and OURS in measured:
        console.print(_stages(measured))
    lines = [decoder(), *_scaling(measured), *_lock(measured, rate or _COMMON_RATE), *_cores(measured, rate)]
    for line in lines + _waiting(measured, setting):
        click.echo(line)


def _table(measured: ByName, wire: str, references: list[str], setting: Setting) -> Table:
    """Like with like: those that hand over `wire`, as multiples of the references."""
    rounds = max(map(len, measured.values()), default=0)
    title = f"{wire}, {setting.size} px, batch {setting.batch}, {setting.cores} core(s); medians of {rounds} rounds"
    columns = [f"CPU / {name}" for name in references]
    table = Table("", "CPU ms / image", "images/s", *columns, title=title)
    for name, found in measured.items():
        if CONTENDERS[name].wire == wire:
            ratios = (_ratios(found, measured[other], lambda m: m.cpu_ms) for other in references)
            table.add_row(
                name,
                f"{median(m.cpu_ms for m in found):.3f}",
                f"{median(m.images_per_second for m in found):,.0f}",
                *(f"{median(r):.2f} ({min(r):.2f} .. {max(r):.2f})" for r in ratios),
            )
    return table


def _stages(measured: ByName) -> Table:
    """Of one thread; the rest is what the whole pipeline takes beyond its stages: order, queue, threads, hand-over."""
    table = Table("stage", "CPU ms / image", "share", title="where it goes")
    pairs = list(zip(measured[STAGES], measured[OURS], strict=True))
    whole = median(ours.cpu_ms for _, ours in pairs)
    for name in _STAGES:
        part = median(_part_ms(stages, name) for stages, _ in pairs)
        table.add_row(name, f"{part:.3f}", f"{part / whole:.0%}")
    rest = median(ours.cpu_ms - sum(_part_ms(stages, s) for s in _STAGES) for stages, ours in pairs)
    table.add_row("order and hand-over", f"{rest:.3f}", f"{rest / whole:.0%}")
    table.add_row("all", f"{whole:.3f}", "100%")
    limit = [ours.cpu_ms / _part_ms(stages, "limit") for stages, ours in pairs]
    table.add_row(
        "limit of whole pictures: JPEG decode alone",
        f"{median(_part_ms(stages, 'limit') for stages, _ in pairs):.3f}",
        f"all / limit {median(limit):.2f}",
    )
    return table


def _scaling(measured: ByName) -> list[str]:
    if TWICE not in measured or OURS not in measured:
        return []
    ratios = _ratios(measured[TWICE], measured[OURS], lambda m: m.images_per_second)
    return [f"twice the cores: {median(ratios):.2f}x the images/s ({min(ratios):.2f} .. {max(ratios):.2f})"]


def _lock(measured: ByName, rate: float) -> list[str]:
    """What the loader costs a training loop that the interpreter keeps busy."""
    lines = []
    if STAGES in measured:
        held = median(
            sum(_part_ms(m, s) for s in ("order", *_STAGES)) - _part_ms(m, "kernel") for m in measured[STAGES]
        )
        lines.append(f"interpreter lock: held for at most {held:.3f} ms of an image")
    if LOCK in measured:
        for kind in ("threads", "processes"):
            stalls = [max(0.0, _part_ms(m, kind)) for m in measured[LOCK]]
            lines.append(
                f"  data.workers={kind}: a loop in Python waits {median(stalls):.3f} ms an image for the lock "
                f"({min(stalls):.3f} .. {max(stalls):.3f}): {median(stalls) * rate / 10:.1f} % of its time at {rate:,.0f} images/s"
            )
    return lines


def _cores(measured: ByName, rate: float | None) -> list[str]:
    if rate is None or OURS not in measured:
        return []
    cores = rate * median(m.cpu_ms for m in measured[OURS]) / 1e3
    return [
        f"{rate:,.0f} images/s need {cores:.1f} cores for data: {math.ceil(cores)}, beside those of training"
    ]


def _waiting(measured: ByName, setting: Setting) -> list[str]:
    if not measured.get(PACED):
        return []
    shares = [m.parts["waiting"] / m.parts["all"] * 100 for m in measured[PACED]]
    return [
        f"a step loop at {setting.pace:,.0f} images/s, with {setting.cores} core(s) for data beside its own, waits for "
        f"data for {median(shares):.2f} % of its time ({min(shares):.2f} .. {max(shares):.2f})"
    ]


def _part_ms(found: Measured, part: str) -> float:
    return found.parts[part] / found.images * 1e3


def _ratios(found: list[Measured], others: list[Measured], what: Callable[[Measured], float]) -> list[float]:
    return [what(mine) / what(other) for mine, other in zip(found, others, strict=True)]
