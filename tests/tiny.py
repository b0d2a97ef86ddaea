"""A model, a plan and batches so small that a bf16 step on a CPU takes milliseconds."""

from typing import Any

import numpy as np
import torch

from pretrain.batch import Batch
from pretrain.config import Config, Plan, resolve
from pretrain.config.plan import DataFacts, Hardware

SAMPLES = 64


def config(**sections: dict[str, Any]) -> Config:
    """A config of a two-block ViT on 8x8 images; `sections` override, for instance engine={"zero_stage": 3}."""
    base: dict[str, dict[str, Any]] = {
        "run": {"dir": "unused"},
        "data": {"train": {"shards": "unused"}},
        "model": {
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "mlp_dim": 32,
            "img_size": (8, 8),
            "patch_size": (4, 4),
            "num_classes": 5,
        },
        "optim": {"lr": 1e-2, "weight_decay": 0.05, "warmup_steps": 2},
        "train": {"global_batch": 8, "total_steps": 20},
        "engine": {"precision": "fp32"},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return Config.model_validate(base)


CPU = Hardware("cpu", "test", has_bf16=True)


def plan(cfg: Config, world_size: int, samples: int = SAMPLES, hardware: Hardware = CPU) -> Plan:
    facts = DataFacts(samples=samples, shards=2, bytes=samples * 1000, digest="0" * 64)
    return resolve(cfg, world_size, facts, hardware)


def global_batch(cfg: Config, step: int) -> Batch:
    """The images, labels and positions of one global batch: a function of the step alone."""
    generator = np.random.default_rng(step)
    n, (height, width) = cfg.train.global_batch, cfg.model.img_size
    images = generator.integers(0, 256, (n, height, width, cfg.model.in_chans), dtype=np.uint8)
    labels = generator.integers(0, cfg.model.num_classes, n)
    return Batch(
        torch.from_numpy(images),
        torch.from_numpy(labels),
        torch.ones(n),
        torch.arange(step * n, (step + 1) * n),
    )


def micro_batches(cfg: Config, pln: Plan, step: int, rank: int) -> list[Batch]:
    """A rank's slice of the global batch, cut and padded as the loader does it."""
    whole = global_batch(cfg, step)
    start, stop = pln.slice_of(rank)
    parts = []
    for index in range(pln.accumulation):
        rows = torch.arange(start + index * pln.micro_batch, start + (index + 1) * pln.micro_batch)
        weights = (rows < stop).float()
        rows = rows.clamp(max=stop - 1)
        parts.append(Batch(whole.images[rows], whole.labels[rows], weights, whole.positions[rows]))
    return parts
