"""One training step, against timm's and transformers' ViT in a plain torch loop and against the GEMM peak.

    python benchmarks/step.py                       # the demo's model, Ti at 32 px and S/16 at 224 px
    python benchmarks/step.py --case demo --rounds 5 --precision bf16
    python benchmarks/step.py --case Ti-32 --case S-224 --compile

A step is: uint8 batch to normalised input, forward, loss, backward, clipping, AdamW. In every round each contender
takes one step, in an order drawn anew, and the matrix product that stands for the peak runs too: what the machine's
neighbours do meets all of them. What is compared is the median over rounds of the ratios within a round. The C library
keeps what a step frees: else it gives some back to the kernel and takes it again in the next step, and who pays for that,
2 % of a step of S/16 on a CPU, is chance.

    ours          our VisionTransformer in a plain torch loop
    timm          timm's VisionTransformer with the same weights and the same optimizer, in the same loop
    transformers  transformers' ViTForImageClassification, likewise
    engine        our VisionTransformer under DeepSpeed ZeRO-1, one process, as `pretrain.train` runs it

With --compile each is there twice, eager and compiled: ours and the engine's block by block, as `engine.compile` does,
the peers' as a whole. In bf16 the plain loops use torch.autocast over fp32 weights; the engine holds bf16 weights and
fp32 masters.
"""

import ctypes
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import peers
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pretrain import logs
from pretrain.batch import Batch
from pretrain.config import Config, Plan, resolve
from pretrain.config.plan import DataFacts
from pretrain.distributed import Ranks, device_of, joined
from pretrain.engine import Engine
from pretrain.hardware import detect
from pretrain.model import InitialWeights, build, forward_flops
from pretrain.objective import Objective
from pretrain.optim import build_optimizer, parameter_groups
from pretrain.world import World

LR = 1e-4
CLIP = 1.0
PEAK_SIZE = 1024
TRAIN_FLOPS_FACTOR = 3
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
AGREE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest relative difference of the contenders' losses at the first step: the same thing is timed."""


@dataclass(frozen=True)
class Case:
    model: dict[str, Any]
    cpu_batch: int
    cuda_batch: int


CASES = {
    "demo": Case(
        {"embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_dim": 512, "img_size": (28, 28), "patch_size": (4, 4),
         "in_chans": 1, "num_classes": 10}, 64, 1024,
    ),
    "Ti-32": Case({"size": "Ti", "img_size": (32, 32), "patch_size": (4, 4), "num_classes": 10}, 32, 512),
    "S-224": Case({"size": "S", "img_size": (224, 224), "patch_size": (16, 16), "num_classes": 1000}, 4, 128),
}  # fmt: skip


@click.command()
@click.option(
    "--case", "names", type=click.Choice(list(CASES)), multiple=True, help="Which model; by default all."
)
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Time each contender compiled as well.")
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of torch on a CPU; by default its own choice."
)
def main(names: tuple[str, ...], rounds: int, precision: str, compiled: bool, threads: int | None) -> None:
    """Time one training step of ours, of timm's and transformers' ViT and of our engine, interleaved."""
    if threads:
        torch.set_num_threads(threads)
    _keep_freed_memory()
    world = World(0, 1, 0, "127.0.0.1", 0, "benchmark")
    with joined(world, device_of(world), 600) as ranks, tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
        for name in names or CASES:
            timed = _run(CASES[name], precision, rounds, ranks, Path(folder), compiled)
            _show(name, precision, *timed)


def _run(
    case: Case, precision: str, rounds: int, ranks: Ranks, folder: Path, compiled: bool
) -> tuple[dict[str, list[float]], int, float]:
    """Seconds of each round by contender (`peak`: of the matrix product), the batch, and FLOP of a step."""
    batch_size = case.cuda_batch if ranks.device.type == "cuda" else case.cpu_batch
    config, plan = _settings(case, precision, batch_size)
    batch = _batch(config, batch_size)
    contenders = _contenders(config, plan, batch, ranks, folder)
    if compiled:
        fast = config.model_copy(update={"engine": config.engine.model_copy(update={"compile": True})})
        contenders |= {
            f"{name}, compiled": step for name, step in _contenders(fast, plan, batch, ranks, folder).items()
        }
    losses = {name: float(step()) for name, step in contenders.items()}
    if max(losses.values()) - min(losses.values()) > AGREE[precision] * losses["ours"]:
        raise click.ClickException(f"the contenders do not compute the same loss: {losses}")
    timed: dict[str, Callable[[], Any]] = {**contenders, "peak": _peak(precision, ranks.device)}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    order, draws = list(timed), random.Random(0)
    for turn in range(-2, rounds):  # two rounds to warm up
        draws.shuffle(order)
        for name in order:
            began = time.perf_counter()
            timed[name]()
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds, batch_size, TRAIN_FLOPS_FACTOR * forward_flops(config.model) * batch_size


def _keep_freed_memory() -> None:
    """Have glibc take tensors from its heap and leave the heap as long as it has grown, for all contenders alike."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _contenders(
    config: Config, plan: Plan, batch: Batch, ranks: Ranks, folder: Path
) -> dict[str, Callable[[], Tensor]]:
    ours = build(config.model, InitialWeights(config.model, 0))
    models: dict[str, nn.Module] = {
        "timm": peers.timm(config.model),
        "transformers": peers.transformers(config.model),
    }
    if config.engine.compile:
        ours.compile_blocks()
        for model in models.values():
            model.compile(dynamic=False)
    return {
        **{
            name: _plain(model, config, batch, ranks.device)
            for name, model in {"ours": ours, **models}.items()
        },
        "engine": _engine(config, plan, batch, ranks, folder),
    }


def _settings(case: Case, precision: str, batch_size: int) -> tuple[Config, Plan]:
    config = Config.model_validate(
        {
            "run": {"dir": "unused"},
            "data": {"train": {"shards": "unused"}},
            "model": case.model,
            "optim": {"lr": LR, "clip_grad_norm": CLIP},
            "train": {"global_batch": batch_size, "total_steps": 1000},
            "engine": {"precision": precision, "zero_stage": 1},
        }
    )
    return config, resolve(config, 1, DataFacts(samples=10**6, shards=1, bytes=10**9, digest=""), detect())


def _batch(config: Config, size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (size, *config.model.img_size, config.model.in_chans)
    return Batch(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        torch.randint(0, config.model.num_classes, (size,), generator=generator),
        torch.ones(size),
        torch.arange(size),
    )


def _plain(model: nn.Module, config: Config, batch: Batch, device: torch.device) -> Callable[[], Tensor]:
    """A training step as a person writes it in plain torch."""
    model.to(device).train()
    groups = parameter_groups(model.named_parameters(), config.optim, config.model.num_blocks)
    optimizer = build_optimizer(groups, config.optim)
    objective = Objective(config.objective, config.model.num_classes)

    def step() -> Tensor:
        data = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.engine.precision == "bf16"):
            loss = objective.losses(model(data.images), data.labels).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _engine(config: Config, plan: Plan, batch: Batch, ranks: Ranks, folder: Path) -> Callable[[], Tensor]:
    with logs.quiet_stdout(folder / "engine.log"):
        engine = Engine(config, plan, ranks, folder / "engine.log")
    engine.write(InitialWeights(config.model, 0))
    return lambda: engine.step([batch], LR).loss_sum / len(batch)


def _peak(precision: str, device: torch.device) -> Callable[[], Tensor]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = PEAK_SIZE * (8 if device.type == "cuda" else 1)
    a = torch.randn(size, size, device=device).to(dtype)
    return lambda: a @ a


def _show(name: str, precision: str, seconds: dict[str, list[float]], batch: int, step_flops: float) -> None:
    size = PEAK_SIZE * (8 if torch.cuda.is_available() else 1)
    peak = 2 * size**3 / statistics.median(seconds["peak"])
    title = f"{name}, {precision}, batch {batch}; GEMM peak {peak / 1e9:,.0f} GFLOP/s; medians of {len(seconds['ours'])}"
    table = Table("", "ms", "images/s", "time / ours", "range", "share of peak", title=title)
    for contender in (name for name in seconds if name != "peak"):
        median = statistics.median(seconds[contender])
        ratios = [theirs / ours for theirs, ours in zip(seconds[contender], seconds["ours"], strict=True)]
        table.add_row(
            contender,
            f"{median * 1e3:,.1f}",
            f"{batch / median:,.0f}",
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.2f} .. {max(ratios):.2f}",
            f"{step_flops / median / peak:.1%}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
