"""Ranks that act together: the process groups, small agreements, and the exchange at every step boundary.

Two groups exist. The default one (NCCL on CUDA, gloo on CPUs) belongs to the engine. The control group is gloo on
every device: objects of a few bytes go over it, from the main thread only, so that a decision that leads to a
collective is the same on all ranks and no agreement waits for the device.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from pretrain.errors import ConfigError, PeerError, UserError
from pretrain.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of this job, as one of them sees it. Every method is called by all ranks, in the same order."""

    world: World
    device: torch.device
    control: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def size(self) -> int:
        return self.world.size

    @property
    def is_main(self) -> bool:
        return self.world.is_main

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on all ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value on all ranks; what the others pass is ignored."""
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        received: T = values[0]
        return received

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        result: list[float] = tensor.tolist()
        return result

    def start_any(self, value: bool) -> Callable[[], bool]:
        """Begin to ask whether `value` is true on any rank; the call that is returned waits for the answer."""
        tensor = torch.tensor(float(value))
        work = dist.all_reduce(tensor, group=self.control, async_op=True)
        assert work is not None

        def answer() -> bool:
            work.wait()
            return tensor.item() > 0

        return answer

    def barrier(self) -> None:
        self.gather(None)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that may fail on some ranks only; then all ranks fail, or none.

        The rank that failed raises its own error; the others raise `PeerError` with the first culprit's words.
        The block itself must not enter a collective after its first possible failure.
        """
        failure: BaseException | None = None
        try:
            yield
        except (UserError, OSError) as error:
            failure = error
        messages = self.gather(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        culprits = [(rank, message) for rank, message in enumerate(messages) if message is not None]
        if culprits:
            rank, message = culprits[0]
            raise PeerError(f"stopped because rank {rank} failed: {message}")


@contextlib.contextmanager
def joined(world: World, device: torch.device, timeout_seconds: int) -> Iterator[Ranks]:
    """Join the job's process groups, and leave them at the end. All ranks.

    A collective that takes longer than `timeout_seconds` ends the ranks that wait: over gloo it raises, over NCCL
    torch's watchdog logs it and aborts the process. Raises `ConfigError` where two ranks would share a GPU.
    """
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # who meets nobody needs no port
    alone = dist.HashStore() if world.size == 1 else None  # type: ignore[attr-defined]
    dist.init_process_group(
        backend,
        init_method=None if alone is not None else f"tcp://{world.master_addr}:{world.master_port}",
        store=alone,
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
    )
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(control, dist.ProcessGroup)  # every rank is a member
        ranks = Ranks(world, device, control)
        _refuse_shared_devices(ranks)
        yield ranks
    except UserError as error:
        error.is_shared = True
        raise
    finally:
        dist.destroy_process_group()


def device_of(world: World) -> torch.device:
    """The device of this rank: its own CUDA device where there is one, else the CPU.

    Where the launcher shows each task a single device, that one is number 0 for every local rank. Where there are more
    ranks than devices they share, which `joined` refuses: only there do all ranks hear of it.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank % torch.cuda.device_count())


def _refuse_shared_devices(ranks: Ranks) -> None:
    """NCCL would say it at the first collective, in words about ncclInvalidUsage."""
    mine = None
    if ranks.device.type == "cuda":
        mine = str(torch.cuda.get_device_properties(ranks.device).uuid)
    sharing = shared(ranks.gather(mine))
    if sharing:
        raise ConfigError(
            f"ranks {' and '.join(map(str, sharing[0]))} use the same GPU; start one process for each GPU, "
            "--num_processes N or --nproc_per_node N (one GPU: plain `python -m pretrain.train`)."
        )


def shared(devices: Sequence[str | None]) -> list[list[int]]:
    """Groups of ranks that name the same device; None (a CPU) is shared by right."""
    users: dict[str, list[int]] = {}
    for rank, device in enumerate(devices):
        if device is not None:
            users.setdefault(device, []).append(rank)
    return [ranks for ranks in users.values() if len(ranks) > 1]


class StepFacts(NamedTuple):
    """What every rank says of a step, summed over ranks: what all ranks then know of it."""

    step: int
    loss_sum: float
    skips: float
    stops: float
    wait_seconds: float
    bad_samples: float
    saves_due: float
    saves_written: float


class StepExchange:
    """The agreement at step boundaries: one small sum over ranks, two steps behind, so that nobody waits for it.

    `push` is called once a step on all ranks. The loss is copied off the device while the next step runs, summed
    over ranks while the one after runs, and returned by the push after that: the same facts at the same step on
    every rank. `drain` hands out what is still under way, in order; all ranks call it at the same step.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._copied: deque[tuple[int, torch.Tensor, torch.cuda.Event | None, tuple[float, ...]]] = deque()
        self._summed: deque[tuple[int, torch.Tensor, Any]] = deque()

    def push(
        self,
        step: int,
        loss_sum: torch.Tensor,
        *,
        applied: bool,
        stop: bool,
        wait_seconds: float,
        bad_samples: int,
        save_due: bool,
        save_written: bool,
    ) -> StepFacts | None:
        """Add this rank's facts of `step`; returns those of an earlier step once all ranks' are in."""
        event = None
        host = loss_sum.detach()
        if loss_sum.is_cuda:
            host = torch.empty(loss_sum.shape, dtype=loss_sum.dtype, pin_memory=True)
            host.copy_(loss_sum.detach(), non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        flags = [float(flag) for flag in (not applied, stop)]
        others = (*flags, wait_seconds, float(bad_samples), float(save_due), float(save_written))
        self._copied.append((step, host, event, others))
        if len(self._copied) > 1:
            self._start_sum()
        return self._finish_sum() if len(self._summed) > 1 else None

    def drain(self) -> list[StepFacts]:
        """The facts of all steps pushed so far and not yet returned."""
        while self._copied:
            self._start_sum()
        facts = []
        while self._summed:
            facts.append(self._finish_sum())
        return facts

    def _start_sum(self) -> None:
        step, host, event, others = self._copied.popleft()
        if event is not None:
            event.synchronize()
        facts = torch.tensor([host.item(), *others], dtype=torch.float64)
        self._summed.append((step, facts, dist.all_reduce(facts, group=self._ranks.control, async_op=True)))

    def _finish_sum(self) -> StepFacts:
        step, facts, work = self._summed.popleft()
        work.wait()
        return StepFacts(step, *facts.tolist())
