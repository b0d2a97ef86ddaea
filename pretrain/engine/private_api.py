"""Every private or undocumented thing of DeepSpeed and torch that this product touches, and why.

Nothing else in the product may. `tests/engine/test_engine.py` builds an engine of each stage and checks that
all of it is still there and of the kind that is expected, so that an upgrade fails in a test and not in a run.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOUCHED: dict[str, tuple[str, ...]] = {
    "engine": (
        "data_parallel_group",
        "seq_data_parallel_group",
        "optimizer",
        "module",
        "zero_optimization_stage",
        "get_global_grad_norm",
    ),
    "optimizer, stages 1 and 2": ("update_lp_params", "dp_process_group", "overflow"),
    "parameter, stages 1 and 2": ("_hp_mapping",),
    "optimizer, stage 3": (
        "get_param_id",
        "grad_position",
        "fp32_partitioned_groups_flat",
        "persistent_parameters",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
        "dp_process_group",
        "overflow",
    ),
    "parameter, stage 3": ("ds_numel", "ds_shape", "all_gather"),
}
"""Names by the object that has them; besides these, `deepspeed.ops.__compatible_ops__` and what `pieces` says."""


def missing(engine: Any) -> list[str]:
    """Names of `TOUCHED` that this engine, its optimizer or its parameters do not have."""
    stages = {0: None, 1: "stages 1 and 2", 2: "stages 1 and 2", 3: "stage 3"}[
        engine.zero_optimization_stage()
    ]
    objects = {"engine": [engine]}
    if stages:
        objects[f"optimizer, {stages}"] = [engine.optimizer]
        objects[f"parameter, {stages}"] = list(engine.module.parameters())
    return [
        f"{kind}: {name}"
        for kind, holders in objects.items()
        for name in TOUCHED[kind]
        if not all(hasattr(holder, name) for holder in holders)
    ]


class Piece(NamedTuple):
    """Elements [start, stop) of a flattened parameter live in `flat` from `offset` on."""

    start: int
    stop: int
    flat: Tensor
    offset: int


def forbid_cpu_builds() -> None:
    """Keep DeepSpeed from compiling `deepspeed_shm_comm` at start on a CPU (40-60 s; a killed build hangs the next).

    Touches: `deepspeed.ops.__compatible_ops__`. The op serves inference only; there is no public switch.
    """
    import deepspeed.ops  # not at the top: DeepSpeed chooses its device when it is first imported

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_timeouts(engine: Any, timeout: timedelta) -> None:
    """Give DeepSpeed's process groups our timeout; it creates them with torch's default of half an hour.

    Touches: `engine.data_parallel_group`, `engine.seq_data_parallel_group`, `optimizer.dp_process_group`.
    """
    groups = {engine.data_parallel_group, engine.seq_data_parallel_group}
    groups.add(getattr(engine.optimizer, "dp_process_group", engine.data_parallel_group))
    for group in groups:
        torch.distributed.set_timeout(timeout, group)


def pieces(engine: Any, parameter: Tensor) -> Iterator[Piece]:
    """Where this rank holds fp32 elements of `parameter`, whatever the ZeRO stage.

    Touches, stages 1 and 2: `parameter._hp_mapping` (a `tensor_fragment`), and the flat masters
    `single_partition_of_fp32_groups` or, for bf16 at stage 1, `fp32_groups_flat_partition`.
    Touches, stage 3: `get_param_id`, `grad_position`, `fp32_partitioned_groups_flat`, `parameter.ds_numel`.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        yield Piece(0, parameter.numel(), parameter, 0)
    elif stage < 3:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = flat_masters(optimizer)[mapping.param_group_index]
            yield Piece(low.start, low.start + low.numel, flat, high.start)
    else:
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        total: int = parameter.ds_numel  # type: ignore[attr-defined]
        start = min(torch.distributed.get_rank() * length, total)
        stop = min(start + length, total)
        if start < stop:
            yield Piece(start, stop, optimizer.fp32_partitioned_groups_flat[group], offset)


def flat_masters(optimizer: Any) -> list[Tensor]:
    """The flat fp32 masters of stages 1 to 3: what the inner optimizer sees as its parameters."""
    for name in (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    ):
        if hasattr(optimizer, name):
            masters: list[Tensor] = getattr(optimizer, name)
            return masters
    raise AttributeError(f"{type(optimizer).__name__} has no flat fp32 masters under a name that we know")


def refresh_weights(engine: Any) -> None:
    """Copy the fp32 masters to the weights that the forward pass uses. All ranks.

    Touches, stages 1 and 2: `optimizer.update_lp_params`. Stage 3: `_partition_all_parameters`,
    `_reassign_or_swap_out_partitioned_parameters`, `persistent_parameters` and their `all_gather`.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter before ZeRO-3 took it apart. Touches: `parameter.ds_shape`."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
