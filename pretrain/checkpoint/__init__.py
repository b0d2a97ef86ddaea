"""Checkpoints of our own: slices by parameter name, any world size, any ZeRO stage, no pickle.

    checkpoints/
      latest                       the newest committed step's folder name
      best                         the folder name of the best by validation, if any
      step_00000800/
        manifest.json              written last: shapes, who holds which slice, size and sha256 of every file,
                                   config, data position, metrics; carries its own sha256
        rank_00000.safetensors     the slices that rank 0 owned, fp32: `kind:parameter:start:stop`
      step_00000800.tmp/           a save under way, or one that was killed; never read, replaced by the next

A save is written aside, flushed, hashed, agreed by all ranks and renamed. A load verifies the hashes before it reads,
and falls back to the newest checkpoint that verifies.

`layout` names the files and imports nothing heavy; `save` and `load` import torch, and are imported by their own names.
"""

from pretrain.checkpoint.layout import Manifest, checkpoints, read_manifest, resolve

__all__ = ["Manifest", "checkpoints", "read_manifest", "resolve"]
