"""How tokens learn where they are. One function a kind of position embedding (PE)."""

from typing import Literal

import torch
from torch import Tensor


def add_learned_1d(
    patches: Tensor,
    cls_token: Tensor | None,
    table: Tensor,
    order: Literal["cls_then_pe", "pe_then_cls"],
) -> Tensor:
    """z_0 of equation 1: patches [B, N, D] to tokens [B, T, D] with a learned table added, cls token first.

    cls_token  [1, 1, D]; none: no such token, T = N and the order says nothing
    table      [1, T, D] for cls_then_pe (the paper: every token has a row), [1, N, D] for pe_then_cls (DeiT-3,
               timm's `no_embed_class`: the cls token has none). Row 0 of the one could be added to the cls token
               for good to give the other, so both span the same functions.
    """
    if cls_token is None:
        return patches + table
    cls = cls_token.expand(len(patches), -1, -1)
    if order == "cls_then_pe":
        return torch.cat([cls, patches], dim=1) + table
    return torch.cat([cls, patches + table], dim=1)
