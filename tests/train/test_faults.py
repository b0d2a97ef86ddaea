"""Whatever goes wrong where, on which rank and when: the run ends with a named error, and the same command mends it.

Each case starts two ranks with one fault, and then the same command without: the weights have to be those of a run that
nothing happened to, bit for bit, and so have the metrics. `pytest -m slow -s` runs all cases and prints the count.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import pytest
import ranks as pool
import torch
from patience import PATIENCE
from ports import free_port
from test_bad_input import write
from test_resume import config, journal

from pretrain import faults
from pretrain.checkpoint.load import open_weights
from pretrain.errors import ConfigError
from pretrain.faults import KINDS, ON_RANK_0, POINTS, Fault

TOTAL = 6
TIMEOUT = 20
"""Of a run in which a rank is frozen; the others get more, for a busy machine freezes them too."""
LIMIT = float(PATIENCE)
"""A rank that lives longer hangs; the longest that one did live after the fault is printed by the long version."""

SAVES = ("save", "write", "commit", "manifest", "rename", "latest")


def all_cases() -> list[tuple[int, Fault]]:
    """(ZeRO stage, fault): every point with every kind on every rank at two steps, and NaN at every step and stage."""
    stages = [0, 1, 2, 3]
    cases = []
    for point in POINTS:
        for kind in (kind for kind in KINDS if kind != "NaN"):
            for rank in (0,) if point in ON_RANK_0 else (0, 1):
                for step in (0, 3) if point not in SAVES else (0, 4):
                    cases.append((stages[len(cases) % 4], Fault(point, rank, step, kind)))
    nans = [(stage, Fault("step", step % 2, step, "NaN")) for stage in stages for step in range(TOTAL)]
    return [*cases, *nans]


class End(NamedTuple):
    """How the ranks of one start ended. seconds: from the fault, or the start, to the end of the last of them."""

    codes: list[int]
    words: list[str]
    seconds: float

    @property
    def fired(self) -> bool:
        return any("injected fault" in words for words in self.words)


def _start(environment: dict[str, str], *args: Any) -> None:
    os.environ |= environment
    pool._command(*args)


def start(path: str, output: Path, fault: Fault | None) -> End:
    """The same command on two ranks; a rank that is frozen is ended when the other has gone, as a launcher does it."""
    output.mkdir(parents=True, exist_ok=True)
    allowed = TIMEOUT if fault is not None and fault.kind == "SIGSTOP" else PATIENCE // 2
    arguments = (path, f"engine.timeout_seconds={allowed}")
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if fault is not None:
        environment[faults.VARIABLE] = ":".join(map(str, fault))
    port = free_port()
    said = [output / f"rank_{rank}.txt" for rank in (0, 1)]
    processes = [
        pool._context.Process(
            target=_start, args=(environment, said[rank], rank, 2, port, arguments), daemon=True
        )
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    began, since = time.monotonic(), None
    ended: set[Any] = set()
    """By us; of those the exit code is known, whatever the server that forked them makes of it."""
    while any(process.is_alive() for process in processes):
        if since is None and any(s.exists() and "injected fault" in s.read_text() for s in said):
            since = time.monotonic()
        frozen = fault is not None and fault.kind == "SIGSTOP" and since is not None
        hung = time.monotonic() - began > LIMIT
        if hung or (frozen and not processes[1 - fault.rank].is_alive()):  # type: ignore[union-attr]
            ended = {process for process in processes if process.is_alive()}
            for process in processes:
                process.kill()
            if hung:
                return End([], [s.read_text() for s in said], LIMIT)
            break
        time.sleep(0.02)
    seconds = time.monotonic() - (since or began)
    for process in processes:
        process.join()
    codes = [-signal.SIGKILL if process in ended else process.exitcode or 0 for process in processes]
    return End(codes, [s.read_text() for s in said], seconds)


class Bench:
    """The folder of all cases, and what undisturbed runs give."""

    def __init__(self, folder: Path, digits: Path) -> None:
        self.folder, self.digits = folder, digits
        self._golden = cache(self._undisturbed)
        self._lock = Lock()

    def command(self, name: str, stage: int) -> tuple[Path, str]:
        run = self.folder / name
        cfg = config(
            run, self.digits, stage,
            train={
                "global_batch": 8, "micro_batch": None, "total_steps": TOTAL, "log_every_steps": 1, "eval_every_steps": 3,
            },
            engine={"zero_stage": stage, "precision": "fp32"},
            checkpoint={"every_steps": 2, "background": stage % 2 == 0},
            recovery={"after_bad_steps": 1},
        )  # fmt: skip
        place = self.folder / f"{name}-config"
        place.mkdir()
        return run, str(write(cfg, place))

    def golden(self, stage: int, nan_step: int | None) -> tuple[dict[str, torch.Tensor], dict[Any, float]]:
        with self._lock:
            return self._golden(stage, nan_step)

    def _undisturbed(
        self, stage: int, nan_step: int | None
    ) -> tuple[dict[str, torch.Tensor], dict[Any, float]]:
        """Weights and metrics of a run that nothing happened to, or whose other rank had the NaN."""
        name = f"golden-{stage}-{nan_step}"
        run, path = self.command(name, stage)
        fault = None if nan_step is None else Fault("step", 1 - nan_step % 2, nan_step, "NaN")
        end = start(path, self.folder / f"{name}-out", fault)
        assert end.codes == [0, 0], end
        return weights(run), journal(run)

    def verdict(self, number: int, stage: int, fault: Fault) -> tuple[str, str, float]:
        """(injected and recovered in one go, by the same command | what went wrong, words, seconds to the end)."""
        name = f"case-{number}"
        run, path = self.command(name, stage)
        end = start(path, self.folder / f"{name}-out", fault)
        if not end.codes:
            return "hung", "\n".join(end.words), end.seconds
        if not end.fired:
            return "not injected", "\n".join(end.words), end.seconds
        in_one_go = end.codes == [0, 0]
        if not in_one_go:
            if not is_named(fault, end):
                return "unnamed", f"{end.codes}\n" + "\n".join(end.words), end.seconds
            again = start(path, self.folder / f"{name}-out", None)
            if again.codes != [0, 0]:
                return "not recovered", f"{again.codes}\n" + "\n".join(again.words), end.seconds
        expected, values = self.golden(stage, fault.step if fault.kind == "NaN" and in_one_go else None)
        got = weights(run)
        if any(not torch.equal(value, expected[key]) for key, value in got.items()):
            return "wrong weights", "\n".join(end.words), end.seconds
        logged = journal(run)
        if (
            fault.kind == "NaN" and not in_one_go
        ):  # the step was logged as NaN first, and other when executed again
            logged = {
                k: v for k, v in logged.items() if not k[0].startswith(("nonfinite/", "resume/diverged"))
            }
        if logged != values:
            return "wrong metrics", str(set(logged.items()) ^ set(values.items())), end.seconds
        return ("recovered in one go" if in_one_go else "named, then recovered"), "", end.seconds


def weights(run: Path) -> dict[str, torch.Tensor]:
    opened = open_weights(run)
    assert opened.step == TOTAL
    return {name: opened.weights[name] for name in opened.weights}


def is_named(fault: Fault, end: End) -> bool:
    """Whether every rank that could say anything ended with an error that says what happened."""
    silent = {signal.SIGKILL: -signal.SIGKILL, signal.SIGSTOP: -signal.SIGKILL}
    for rank, (code, words) in enumerate(zip(end.codes, end.words, strict=True)):
        if rank == fault.rank and fault.kind in ("SIGKILL", "SIGSTOP"):
            expected = code == silent[signal.Signals[fault.kind]]
        elif rank == fault.rank or fault.kind == "NaN":
            name = {"NaN": "not finite", "ENOSPC": "No space left", "EIO": "Input/output error"}
            # rank 0 speaks for all: of the others the exit code tells
            expected = code > 0 and (rank > 0 or name.get(fault.kind, "injected at") in words)
        else:
            told = "rank was lost", f"rank {fault.rank}", "injected at"
            expected = code > 0 and (rank > 0 or any(part in words for part in told))
        if not expected:
            return False
    return True


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Bench:
    pool._context.Process(target=int).start()  # one server, before the threads ask for it
    return Bench(tmp_path_factory.mktemp("faults"), digits)


def run_all(bench: Bench, cases: Sequence[tuple[int, Fault]], at_a_time: int) -> Counter[str]:
    began = time.monotonic()
    with ThreadPoolExecutor(at_a_time) as threads:
        jobs = [threads.submit(bench.verdict, number, *case) for number, case in enumerate(cases)]
        ends = []
        for (stage, fault), job in zip(cases, jobs, strict=True):
            ends.append(job.result())
            what, words, seconds = ends[-1]
            print(f"{what}: stage {stage}, {':'.join(map(str, fault))}, {seconds:.1f} s\n{words}", flush=True)
    counts = Counter(what for what, _, _ in ends)
    print(
        f"{len(cases)} faults: {dict(counts)}; longest from a fault to the end {max(s for _, _, s in ends):.1f} s "
        f"(timeout {TIMEOUT} s); {time.monotonic() - began:.0f} s in all"
    )
    return counts


def is_well(counts: Counter[str]) -> bool:
    return set(counts) <= {"recovered in one go", "named, then recovered"}


def test_a_sample_of_faults_ends_named_and_the_same_command_mends_them(bench: Bench) -> None:
    """One of each kind, at the same places every time."""
    chance = random.Random(4)
    near = [
        case for case in all_cases() if case[0] in (0, 3)
    ]  # an undisturbed run of each stage is needed too
    cases = [chance.choice([case for case in near if case[1].kind == kind]) for kind in KINDS]
    assert is_well(run_all(bench, cases, 3))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_fault_ends_named_and_the_same_command_mends_it(bench: Bench) -> None:
    cases = all_cases()
    assert len(cases) >= 200
    assert is_well(run_all(bench, cases, 4))


@pytest.mark.parametrize(
    "value",
    [
        "",
        "step",
        "step:0:1",
        "stop:0:1:EIO",
        "step:0:1:SIGTERM",
        "step:-1:1:EIO",
        "step:0:x:EIO",
        "step:0:1:EIO:1",
    ],
)
def test_a_fault_that_nobody_knows_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="is not point:rank:step:kind"):
        faults.arm({faults.VARIABLE: value}, 0)


@pytest.mark.parametrize("value", ["write:0:1:NaN", "rename:1:1:EIO"])
def test_a_fault_that_could_never_happen_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"NaN is for step|only rank 0 comes past rename"):
        faults.arm({faults.VARIABLE: value}, 0)


def test_a_fault_happens_once_on_its_rank_from_its_step_on() -> None:
    faults.arm({faults.VARIABLE: "save:0:5:EIO"}, 1)
    assert not faults.at("save", 5)
    faults.arm({faults.VARIABLE: "save:0:5:EIO"}, 0)
    assert not faults.at("save", 4)
    assert not faults.at("write", 5)
    with pytest.raises(OSError, match="injected at save"):
        faults.at("save", 6)
    assert not faults.at("save", 7)
    faults.arm({}, 0)
