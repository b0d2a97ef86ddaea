"""One ViT under DeepSpeed: take a step, run a forward pass, read and write the fp32 masters.

DeepSpeed's engine is built directly from the resolved plan. It reduces gradients, shards states and calls the
optimizer; the batch, the loss weights, the learning rate and the checkpoints are ours.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import faults, logs
from pretrain.batch import Batch
from pretrain.config import Config, Plan
from pretrain.distributed import Ranks
from pretrain.engine import fragments, private_api
from pretrain.engine.fragments import Fragment
from pretrain.engine.replicas import checksums
from pretrain.engine.settings import deepspeed_config
from pretrain.engine.timing import ForwardTime
from pretrain.errors import ConfigError
from pretrain.model import VisionTransformer, drop_path_rates, dropout_keys, keep_factors
from pretrain.objective import Mix, Objective, draw_mix
from pretrain.optim import build_optimizer, parameter_groups, set_lr

Reader = Callable[[str, str, int, int], Tensor]
"""(kind, parameter, start, stop) -> fp32 [stop - start]; kind is `weight` or a state of the optimizer."""


Timed = Callable[[str], contextlib.AbstractContextManager[None]]


def _untimed(part: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclass(frozen=True)
class StepOutput:
    """loss_sum: fp32 scalar on the device, this rank's weighted losses added up; grad_norm: of the whole global
    batch before clipping, the same on all ranks; applied: False where a non-finite loss or gradient made all ranks skip."""

    loss_sum: Tensor
    grad_norm: float | Tensor
    applied: bool


class Engine:
    """All ranks construct it and call each method together, in the same order."""

    def __init__(self, config: Config, plan: Plan, ranks: Ranks, log_file: Path) -> None:
        """Build module, optimizer and DeepSpeed engine. Weights are placeholders until `write` or `restore`."""
        self.config = config
        self.plan = plan
        self.ranks = ranks
        self._objective = Objective(config.objective, config.model.num_classes)
        self._rates = drop_path_rates(config.model)
        if config.engine.deterministic:
            _be_deterministic()
        os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)  # read when deepspeed is first imported
        ranks.world.export(os.environ)
        if (
            ranks.device.index is not None
        ):  # what DeepSpeed takes its device from; a task may see one GPU only
            os.environ["LOCAL_RANK"] = str(ranks.device.index)
        if config.engine.compile:
            _require_compiler()
        self._engine, self._optimizer = self._build(log_file)
        private_api.set_timeouts(self._engine, timedelta(seconds=config.engine.timeout_seconds))
        self._held = fragments.held(self._engine)
        self._forward_time = ForwardTime(ranks.device)
        self.steps_taken = 0
        """Updates made so far, over all attempts; skipped steps are none."""

    def _build(self, log_file: Path) -> tuple[Any, torch.optim.Optimizer]:
        import deepspeed

        logs.redirect("DeepSpeed", log_file)
        if self.ranks.device.type == "cpu":
            private_api.forbid_cpu_builds()
        settings = deepspeed_config(self.plan)
        deepspeed.init_distributed(
            dist_backend=None, auto_mpi_discovery=False, verbose=False, dist_init_required=False
        )
        partitioned = (
            deepspeed.zero.Init(config_dict_or_path=settings)
            if self.plan.zero_stage == 3
            else contextlib.nullcontext()
        )
        with partitioned:
            module = VisionTransformer(self.config.model, self.plan.checkpoint_every_blocks)
        if self.plan.zero_stage < 3:
            module.to(self.ranks.device)
        if self.config.engine.compile:
            module.compile_blocks()
        groups = parameter_groups(module.named_parameters(), self.config.optim, self.config.model.num_blocks)
        optimizer = build_optimizer(groups, self.config.optim)
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        return engine, optimizer

    def step(self, micro_batches: Sequence[Batch], lr: float, timed: Timed = _untimed) -> StepOutput:
        """One optimizer update from this rank's slice of the global batch, as `plan.accumulation` micro-batches.

        timed: wraps each forward, backward and optimizer part, named so.
        """
        self._engine.train()
        set_lr(self._optimizer.param_groups, lr)
        loss_sum = torch.zeros((), device=self.ranks.device)
        for position, batch in enumerate(micro_batches, start=1):
            (keep, keys), mix = self._draws(batch), self._mix(batch)
            on_device = batch.to(self.ranks.device)
            own_pixels, own_label = (mix.pixels(self.plan.img_size), mix.label) if mix else (None, None)
            with timed("forward"), self._forward_time.measured():
                logits = self._engine(on_device.images, keep, keys, own_pixels)
                losses = self._objective.losses(logits, on_device.labels, own_label)
                loss = (losses * on_device.weights).sum()
            loss_sum += loss.detach()
            with timed("backward"):
                # A loss that is not finite may have gradients that are; 0 * loss is 0 or makes them NaN, on all ranks.
                self._engine.backward(
                    loss * (self.plan.loss_scale + 0.0 * loss.detach()), scale_wrt_gas=False
                )
            with timed("optimizer"):
                if position == self.plan.accumulation:
                    norm = self._clip_replicated()
                    faults.at("update")
                self._engine.step()
        if self.plan.zero_stage > 0:
            norm = self._engine.get_global_grad_norm()
            applied = not self._engine.optimizer.overflow
        else:
            applied = bool(torch.isfinite(norm))
        self.steps_taken += applied
        return StepOutput(loss_sum, norm, applied)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [b, K] without gradients, drop path or dropout. At stage 3 it gathers weights: all ranks call it equally often."""
        self._engine.eval()
        with torch.no_grad():
            logits: Tensor = self._engine(batch.to(self.ranks.device).images)
        return logits

    def take_forward_seconds(self) -> float:
        """Time of training's forward passes since the last call; see `ForwardTime.take`."""
        return self._forward_time.take()

    def checksums(self) -> dict[str, int]:
        """Of each weight that the forward pass uses and every rank holds whole, by name; at stage 3 there is none."""
        if self.plan.zero_stage == 3:
            return {}
        names, tensors = zip(*self._engine.module.named_parameters(), strict=True)
        return dict(zip(names, checksums(tensors).tolist(), strict=True))

    def write(self, weights: Mapping[str, Tensor]) -> None:
        """Set the fp32 masters exactly to `weights` (by name, fp32, read one at a time) and refresh what forward uses.

        DeepSpeed clones its masters from weights that it has already rounded to bf16; this undoes that.
        """
        by_name: dict[str, list[Fragment]] = {name: [] for name in self.shapes}
        for fragment in self._held:
            by_name[fragment.name].append(fragment)
        for name, parts in by_name.items():
            if parts:
                value = weights[name].detach().to(torch.float32).reshape(-1)
                for part in parts:
                    part.of(part.flat).copy_(value[part.start : part.stop])
        private_api.refresh_weights(self._engine)

    def restore(self, read: Reader, steps: int) -> None:
        """Set masters and optimizer state from `read(kind, name, start, stop)`; `steps` updates were made before."""
        name = self.config.optim.name
        self.steps_taken = steps
        if steps > 0:
            fragments.make_states(self._optimizer, self._held, name, steps)
        for part in self._held:
            part.of(part.flat).copy_(read("weight", part.name, part.start, part.stop))
            if steps > 0:
                for kind in fragments.STATES[name]:
                    state = part.of(self._optimizer.state[part.flat][kind])
                    state.copy_(read(kind, part.name, part.start, part.stop))
        private_api.refresh_weights(self._engine)

    def slices(self) -> Iterable[tuple[str, int, int, dict[str, Tensor]]]:
        """What this rank writes into a checkpoint: (parameter, start, stop, {kind: fp32 view [stop - start]})."""
        for part in fragments.owned(self._held, self.plan.zero_stage, self.ranks.rank, self.ranks.size):
            state = self._optimizer.state.get(part.flat, {})
            kinds = {"weight": part.of(part.flat)}
            for kind in fragments.STATES[self.config.optim.name]:
                stored = state.get(kind)
                kinds[kind] = torch.zeros_like(kinds["weight"]) if stored is None else part.of(stored)
            yield part.name, part.start, part.stop, kinds

    def whole(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some small weights, whole, fp32 on the host, on all ranks. All ranks call it together."""
        own = [
            (name, start, kinds["weight"].cpu()) for name, start, _, kinds in self.slices() if name in names
        ]
        found = {name: torch.zeros(self.shapes[name]) for name in names}
        for parts in self.ranks.gather(own):
            for name, start, part in parts:
                found[name].view(-1)[start : start + len(part)] = part
        return found

    @property
    def model(self) -> VisionTransformer:
        """The module that DeepSpeed runs; at stage 3 its weights are empty outside of a forward pass."""
        module: VisionTransformer = self._engine.module
        return module

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's whole shape, in the module's order."""
        return {name: tuple(private_api.full_shape(p)) for name, p in self._engine.module.named_parameters()}

    def _draws(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """What the model's forward pass takes of chance: drop path's factors and dropout's keys, each where it is on."""
        model, seed, device = self.config.model, self.config.run.seed, self.ranks.device
        keep = keys = None
        if model.drop_path_rate > 0:
            keep = keep_factors(seed, batch.positions, self._rates).to(device, non_blocking=True)
        if model.dropout_rate > 0:
            keys = dropout_keys(seed, batch.positions, model.num_blocks).to(device, non_blocking=True)
        return keep, keys

    def _mix(self, batch: Batch) -> Mix | None:
        if not self.config.objective.mixes:
            return None
        mix = draw_mix(self.config.objective, self.config.run.seed, batch.positions, self.plan.img_size)
        return mix.to(self.ranks.device)

    def _clip_replicated(self) -> Tensor:
        """Stage 0: norm of the reduced gradient, clipped in place; a non-finite one is dropped so that nothing moves."""
        if self.plan.zero_stage > 0:
            return torch.zeros(())
        parameters = [p for p in self._engine.module.parameters() if p.grad is not None]
        limit = self.plan.clip_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if not torch.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None
        return norm


def _be_deterministic() -> None:
    """Bit-identical repeats on CUDA; cuBLAS reads its workspace setting at its first call."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _require_compiler() -> None:
    """torch.compile builds C++ on a CPU and, for its launchers, on CUDA too; without a compiler it fails in step 1."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"engine.compile needs a C++ compiler, and there is no {compiler} here: "
            "install one (Debian: apt-get install g++), name it in CXX, or leave engine.compile out"
        )
