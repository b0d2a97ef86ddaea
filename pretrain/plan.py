"""`pretrain plan`: what a config resolves to in a given world, and what it needs, before anything is queued."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from pretrain.config import Config, ModelConfig, Plan, load, resolve
from pretrain.config.idle import idle_settings
from pretrain.config.plan import Hardware
from pretrain.errors import ConfigError

GIGABYTE = 10**9
STEP_TO_FORWARD = 3
"""Operations of a training step per operation of a forward pass: backward costs about two of those."""


@dataclass(frozen=True)
class ModelStates:
    """Bytes that one rank holds of the model between two steps."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def model_states(num_parameters: int, plan: Plan) -> ModelStates:
    """What ZeRO leaves on each rank (Rajbhandari et al. 2019, arXiv 1910.02054, section 3.1 and figure 1).

    A weight takes 2 bytes in bf16, else 4; a gradient 4, because it accumulates in fp32; each moment 4; and from
    stage 1 on the fp32 master that the optimizer updates takes another 4. Stage 1 shares out the optimizer's, stage 2
    the gradients as well, stage 3 the weights too. Padding, buffers and what stage 3 keeps whole are left out.
    """
    share = -(-num_parameters // plan.world_size)
    stage = plan.zero_stage
    moments = 2 if plan.optimizer == "adamw" else 1
    master = 1 if stage >= 1 else 0
    return ModelStates(
        weights=(share if stage >= 3 else num_parameters) * (2 if plan.precision == "bf16" else 4),
        gradients=(share if stage >= 2 else num_parameters) * 4,
        optimizer=(share if stage >= 1 else num_parameters) * 4 * (moments + master),
    )


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--nodes", type=click.IntRange(1), help="Machines of the job; needs --gpus-per-node.")
@click.option("--gpus-per-node", type=click.IntRange(1), help="GPUs of each machine; taken to multiply bf16.")
@click.option(
    "--world-size", type=click.IntRange(1), help="Ranks on hardware like this machine's.  [default: 1]"
)
@click.option(
    "--gpu-memory",
    type=click.FloatRange(0, min_open=True),
    help="Memory of each rank's device, in GB (10^9 bytes).",
)
def plan(
    config: Path,
    overrides: tuple[str, ...],
    nodes: int | None,
    gpus_per_node: int | None,
    world_size: int | None,
    gpu_memory: float | None,
) -> None:
    """Show every number that training CONFIG will use, and the memory of its model states.

    OVERRIDES are key.sub=value, for instance train.global_batch=4096. Nothing is trained, and nothing
    is written but the index of plain tars that have none (docs/stores.md).
    Exits with an error where the model states alone exceed --gpu-memory.
    """
    if gpus_per_node is not None and world_size is not None:
        raise click.UsageError("give either --world-size or --gpus-per-node, not both")
    if nodes is not None and gpus_per_node is None:
        raise click.UsageError("--nodes needs --gpus-per-node")
    settings = load(config, overrides)
    if gpus_per_node is not None:
        hardware = Hardware("cuda", "GPU", has_bf16=True)
        resolved, reads = _resolve(settings, (nodes or 1) * gpus_per_node, hardware)
    else:
        resolved, reads = _resolve(settings, world_size or 1, _this_machine())
    rows = [*resolved.table(), ("reading", reads), *_needs(settings.model, resolved)]
    _print(f"Plan of {config}", rows)
    for words in idle_settings(settings):
        click.echo(f"Note: {words}", err=True)
    if gpu_memory is not None:
        click.echo(_verdict(settings.model, resolved, gpu_memory))


def _this_machine() -> Hardware:
    from pretrain.hardware import detect  # here it imports torch

    return detect()


def _resolve(config: Config, world_size: int, hardware: Hardware) -> tuple[Plan, str]:
    """The plan, and what reading the data set will take."""
    from pretrain.data import check_labels, facts, open_dataset, open_training
    from pretrain.data.reader import reading

    seconds = config.data.read_timeout_seconds
    train = open_training(config.data.train, seconds)
    check_labels(train, config.data, config.model.num_classes)
    val = open_dataset(config.data.val.shards, seconds) if config.data.val else None
    if val is not None:
        val.require_classes(config.model.num_classes)
    plan = resolve(config, world_size, facts(train, val), hardware)
    return plan, reading(train, config.data, plan)


def _needs(model: ModelConfig, plan: Plan) -> list[tuple[str, str]]:
    """Rows of (what, value): the model's size, its compute, and the memory of one rank."""
    from pretrain.model import forward_flops, num_parameters

    flops = STEP_TO_FORWARD * forward_flops(model) * plan.global_batch
    states = model_states(num_parameters(model), plan)
    parts = (f"{_gb(getattr(states, name))} {name}" for name in ("weights", "gradients", "optimizer"))
    return [
        ("parameters", f"{num_parameters(model):,}"),
        ("compute", f"{flops:.3g} FLOPs a step, {flops * plan.total_steps:.3g} in all (matrix products)"),
        ("model states per rank", f"{' + '.join(parts)} = {_gb(states.total)}"),
    ]


def _verdict(model: ModelConfig, plan: Plan, gpu_memory: float) -> str:
    """Whether the model states fit; raises `ConfigError` where they do not."""
    from pretrain.model import num_parameters

    states = model_states(num_parameters(model), plan)
    left = gpu_memory * GIGABYTE - states.total
    if left >= 0:
        return (
            f"The model states take {states.total / gpu_memory / GIGABYTE:.1%} of {gpu_memory:g} GB; {_gb(left)} are "
            "left for activations,\nbuffers and the CUDA context, which this estimate does not cover."
        )
    message = f"the model states need {_gb(states.total)} on each rank; --gpu-memory is {gpu_memory:g} GB.\n"
    if plan.zero_stage == 3:
        raise ConfigError(
            message + "  Use more ranks, or a smaller model: ZeRO stage 3 already shares out everything."
        )
    shared = dataclasses.replace(plan, zero_stage=3, precision="fp32" if plan.precision == "fp32" else "bf16")
    need = model_states(num_parameters(model), shared).total
    raise ConfigError(message + f"  Use more ranks, or engine.zero_stage=3, where they need {_gb(need)}.")


def _print(title: str, rows: Sequence[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for what, value in rows:
        table.add_row(what, value)
    Console().print(table)


def _gb(size: float) -> str:
    return f"{size / GIGABYTE:.3g} GB"
