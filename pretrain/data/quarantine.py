"""Bad samples: the bytes are the ones that were packed, and yet no picture with a class can be made of them.

In training a bad sample is set aside and the next one of its shard stands in for it:

    replaced by   sample + 1, sample + 2, ... of the same shard, cyclic, the first that is good; at most `TRIES` are tried
    seen as       the position of the bad one: its crop, its flip, every draw
    counted       when it comes for the first time, in epoch 0, however often it comes again, and whoever meets it
    recorded      by the rank that meets it in `logs/quarantine.rank_N.jsonl`, by all in `quarantine.jsonl`

Who stands in is a function of the data set alone: no rank, thread or restart enters, and nobody has to know of other
bad samples. The count is one of positions: any two ways to a step have the same.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pretrain.errors import BadSampleError, DataError
from pretrain.logs import log

REPORT = "quarantine.jsonl"
FLOOR = 10
"""Bad samples that a run with an error budget may always meet: a share of few samples would be none."""
TRIES = 32

T = TypeVar("T")


class BadSample(NamedTuple):
    """One line of the report. shard: path of the tar; sample: its number in it; epoch, position: where it was met;
    repeat: which copy of it in a batch of repeats."""

    shard: str
    sample: int
    key: str
    reason: str
    epoch: int
    position: int
    repeat: int


def stand_ins(sample: int, samples: int) -> range | list[int]:
    """The numbers that are tried in place of `sample` in a shard of `samples`, in their order."""
    return [(sample + i) % samples for i in range(1, min(TRIES + 1, samples))]


def replaced(sample: int, samples: int, make: Callable[[int], T]) -> T:
    """`make(number)` of the first stand-in of `sample` for which it raises no `BadSampleError`.

    Raises `DataError` naming the last one tried where none is good.
    """
    error: BadSampleError | None = None
    for number in stand_ins(sample, samples):
        try:
            return make(number)
        except BadSampleError as bad:
            error = bad
    raise DataError(
        f"nothing can stand in for sample {sample}: {'it is alone in its shard' if error is None else error}\n"
        f"  The {min(TRIES, samples - 1)} samples after it were tried. Make the shard anew from its source."
    )


class Quarantine:
    """What one rank writes down, and what all of them may bear. Used by one thread."""

    def __init__(self, run_dir: Path, rank: int, max_share: float) -> None:
        """max_share: of the distinct samples seen."""
        self.report = run_dir / REPORT
        self._folder = run_dir / "logs"
        self._own = self._folder / f"quarantine.rank_{rank}.jsonl"
        self._max_share = max_share
        self._known = {(bad.shard, bad.sample) for bad in _read(self._own)}

    def record(self, found: Iterable[BadSample]) -> int:
        """Append to this rank's file what is not in it yet.

        Returns how many of `found` count: those of epoch 0, one copy of each.
        """
        met = {bad.position: bad for bad in found}.values()  # padding repeats a position
        new = {(bad.shard, bad.sample): bad for bad in met if (bad.shard, bad.sample) not in self._known}
        if new:
            _append(self._own, list(new.values()))
            self._known |= new.keys()
        for bad in new.values():
            log.warning("bad sample set aside: %s, sample %d (%s): %s", *bad[:4])
        return sum(bad.epoch == 0 and bad.repeat == 0 for bad in met)

    def merge(self) -> None:
        """Rank 0: bring what all ranks of all attempts wrote into the report, each sample once."""
        first: dict[tuple[str, int], BadSample] = {}
        for file in sorted(self._folder.glob("quarantine.rank_*.jsonl")):
            for bad in _read(file):
                known = first.get((bad.shard, bad.sample), bad)
                first[bad.shard, bad.sample] = min(known, bad, key=lambda b: b.position)
        if first:
            aside = self.report.with_name(self.report.name + ".partial")
            aside.write_text("".join(_line(bad) for _, bad in sorted(first.items())))
            aside.replace(self.report)

    def allows(self, bad: int, seen: int) -> bool:
        """Whether training may go on with `bad` bad samples among `seen`, both distinct."""
        return bad <= allowed(self._max_share, seen)

    def check(self, bad: int, seen: int) -> None:
        """Raise `DataError` where training may not go on."""
        if not self.allows(bad, seen):
            raise DataError(
                f"{bad:,} of the {seen:,} samples seen so far are bad; "
                f"data.max_bad_share {self._max_share:g} allows {allowed(self._max_share, seen):,}\n"
                f"  {self.report} names each with its reason. Mend the shards and begin another run with init.from,\n"
                "  or raise data.max_bad_share and start again: this run goes on from its last checkpoint."
            )


def allowed(max_share: float, seen: int) -> int:
    """How many of `seen` distinct samples may be bad."""
    return max(FLOOR, int(max_share * seen)) if max_share > 0 else 0


def _line(bad: BadSample) -> str:
    return json.dumps(bad._asdict()) + "\n"


def _append(path: Path, found: list[BadSample]) -> None:
    """One write, durable when it returns; a line that a kill cut short is closed first, so that it spoils no other."""
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        file.write((b"\n" if torn else b"") + "".join(map(_line, found)).encode())
        os.fsync(file.fileno())


def _read(path: Path) -> Iterator[BadSample]:
    """The lines of a rank's file; one that a kill cut short is passed over."""
    if not path.is_file():
        return
    for line in path.read_text(errors="replace").split("\n")[:-1]:
        try:
            record: Any = json.loads(line)
            yield BadSample(**record)
        except (ValueError, TypeError):
            log.warning("%s: a line that was cut short is passed over", path)
