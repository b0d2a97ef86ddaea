"""What this machine computes with: the current CUDA device where there is one, else the processor."""

import platform
import re
from pathlib import Path

from pretrain.config.plan import Hardware

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""Without one of these a bf16 matrix product is emulated, 10 to 100 times slower than in fp32."""

BF16_CAPABILITY = (8, 0)
"""Ampere, the first CUDA generation that multiplies bf16; torch's `is_bf16_supported` counts emulation too."""


def detect() -> Hardware:
    """The hardware of this process. Any rank may call it, after it has chosen its device; imports torch."""
    import torch

    if torch.cuda.is_available():
        return Hardware(
            device="cuda",
            name=torch.cuda.get_device_name(),
            has_bf16=torch.cuda.get_device_capability() >= BF16_CAPABILITY,
        )
    return cpu(CPUINFO.read_text() if CPUINFO.exists() else "")


def cpu(cpuinfo: str) -> Hardware:
    """The processor that the text of Linux's /proc/cpuinfo describes; an empty text says nothing of bf16."""

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*: *(.*)$", cpuinfo, re.MULTILINE)
        return found[1] if found else ""

    return Hardware(
        device="cpu",
        name=field("model name") or platform.machine(),
        has_bf16=not BF16_FLAGS.isdisjoint(field("flags").split()),
    )
