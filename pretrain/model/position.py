"""How tokens learn where they are: the position embeddings (PE) of appendix D.4 and table 8, and their successors.

    B  images   T = P + N  tokens   P  prefix tokens: cls, registers   N = R * C  patches in rows and columns, row by row
    D  width of a token             h  heads         d = D / h         p  rows for prefix tokens: P, or 0 (`num_pos_prefix`)

    kind                  parameters                                             what it does
    none                  -                                                      nothing
    learned_1d            pos_embed [1, p + N, D]                                a row is added to each token
    learned_2d            pos_embed_x [1, C, D/2], pos_embed_y [1, R, D/2],      the same; a patch's row is its column's
                          pos_embed_prefix [1, p, D] where p > 0                 vector, then its row's
    relative              rel_pos [2N - 1, d]                                    q_i . rel_pos[i - j] joins the logit of q_i . k_j
    sincos_2d_mae         -                                                      a fixed row is added to each patch
    sincos_2d_big_vision  -                                                      the same, with other frequencies
    rope_2d               -                                                      queries and keys of patches are rotated

A learned kind acts `stem`: once, before block 0; `every_layer`: in every block by a table of the block's own; or
`every_layer_shared`: in every block by one table. The owner of a table, block or model, registers it by
`register_tables` and reads it in its own `forward` by `learned_table`.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ModelConfig

TEMPERATURE = 10_000.0
"""Base of the wavelengths, of sine-cosine and of rotary embeddings (Vaswani et al. 2017, arXiv 1706.03762)."""


class Read(Protocol):
    """A parameter by its name within its owner."""

    def __call__(self, name: str, /) -> Tensor: ...


def table_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of one table; none where the kind is not learned."""
    (rows, columns), width, prefix = config.grid, config.width, config.num_pos_prefix
    if config.pos_embed == "learned_1d":
        return {"pos_embed": (1, prefix + config.num_patches, width)}
    if config.pos_embed == "learned_2d":
        shapes: dict[str, tuple[int, ...]] = {"pos_embed_prefix": (1, prefix, width)} if prefix else {}
        return shapes | {"pos_embed_x": (1, columns, width // 2), "pos_embed_y": (1, rows, width // 2)}
    if config.pos_embed == "relative":
        return {"rel_pos": (2 * config.num_patches - 1, width // config.heads)}
    return {}


def register_tables(owner: nn.Module, config: ModelConfig) -> None:
    """Give `owner` the parameters of one table, as placeholders."""
    for name, shape in table_shapes(config).items():
        owner.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def learned_table(read: Read, config: ModelConfig) -> Tensor:
    """The table that its parameters make: [1, p + N, D] to be added to tokens, or `relative`'s [2N - 1, d]."""
    if config.pos_embed == "relative":
        return read("rel_pos")
    if config.pos_embed == "learned_1d":
        return read("pos_embed")
    rows, columns = config.grid
    x = read("pos_embed_x")[:, None].expand(-1, rows, -1, -1)
    y = read("pos_embed_y")[:, :, None].expand(-1, -1, columns, -1)
    grid = torch.cat([x, y], dim=-1).flatten(1, 2)  # [1, N, D]
    return torch.cat([read("pos_embed_prefix"), grid], dim=1) if config.num_pos_prefix else grid


def add_table(tokens: Tensor, table: Tensor) -> Tensor:
    """[B, T, D] plus a table [1, T, D], or [1, N, D]: then the prefix tokens stay as they are.

    With a row for the cls token this is equation 1 of the paper; without one it is the order of DeiT-3, timm's
    `no_embed_class`. That row is added to nothing else, so it can be added to the token for good: both span the same
    functions.
    """
    without = tokens.shape[1] - table.shape[1]
    return tokens + (F.pad(table, (0, 0, without, 0)) if without else table)


def sincos_2d(config: ModelConfig, device: torch.device) -> Tensor:
    """The fixed table of `sincos_2d_mae` or `sincos_2d_big_vision`: float32 [1, N, D].

    Both put sin and cos of the column, then of the row, side by side, each D/4 wide, at wavelengths that form a
    geometric series; MAE's (facebookresearch/mae, after Chen et al. 2021) stops one short of 2 pi * 10000, the one
    of big_vision (arXiv 2205.01580) ends there.
    """
    quarter = config.width // 4
    last = quarter if config.pos_embed == "sincos_2d_mae" else quarter - 1
    frequencies = TEMPERATURE ** -(torch.arange(quarter, dtype=torch.float64, device=device) / last)
    y, x = _coordinates(config.grid, config.grid, device)
    angles_x, angles_y = x[:, None] * frequencies, y[:, None] * frequencies  # [N, D/4]
    return torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=-1).float()[None]


def rotation(config: ModelConfig, device: torch.device) -> Tensor:
    """Cosines and sines of `rope_2d` for every token: float32 [2, T, d]; prefix tokens are not turned.

    The convention is that of EVA-02 (arXiv 2303.11331) and of timm's `RotaryEmbeddingCat(in_pixels=False)`: of the d
    numbers of a head the first half turns with the row and the second with the column; neighbours (0, 1), (2, 3) ...
    form the planes; plane i of d/4 turns by 10000^(-4i/d) a patch, counted from 0 and, with `rope_reference_grid`,
    stretched so that the grid spans as much as the reference does.
    """
    quarter = config.width // config.heads // 4
    frequencies = TEMPERATURE ** -(torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    y, x = _coordinates(config.grid, config.rope_reference_grid or config.grid, device)
    angles = torch.cat([y[:, None] * frequencies, x[:, None] * frequencies], dim=-1)  # [N, d/2]
    angles = F.pad(angles.repeat_interleave(2, dim=-1), (0, 0, config.num_prefix_tokens, 0))
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Turn queries or keys [B, h, T, d] by `rotation`'s angles, in float32; the dtype stays."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos_sin[0] + turned * cos_sin[1]).to(x.dtype)


def relative_logits(q: Tensor, rel_pos: Tensor) -> Tensor:
    """What `relative` adds to the logits before the softmax: queries [B, h, T, d] -> [B, h, T, T].

    One-dimensional relative attention as in appendix D.4: patches are numbered row by row, the pair of query i and
    key j has the offset i - j, and the embedding of that offset, row i - j + N - 1 of `rel_pos` [2N - 1, d], serves
    as a key: q_i . rel_pos[i - j] / sqrt(d), scaled as the content's logit is. All heads share the embeddings. The
    paper names pairs of patches only; logits with a prefix token on either side get nothing.
    """
    num_patches = (len(rel_pos) + 1) // 2
    prefix = q.shape[2] - num_patches
    # Columns run over j - i, so that each row of the answer is a stretch of one column further left than the last.
    by_offset = q[:, :, prefix:] @ rel_pos.flip(0).t() * q.shape[-1] ** -0.5  # [B, h, N, 2N - 1]
    stretch = 2 * num_patches - 2
    flat = by_offset.flatten(2)[..., num_patches - 1 :][..., : num_patches * stretch]
    logits = flat.unflatten(-1, (num_patches, stretch))[..., :num_patches] if stretch else by_offset
    return F.pad(logits, (prefix, 0, prefix, 0))


def _coordinates(
    grid: tuple[int, int], stretched_to: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, from 0, times stretched_to / grid: float64 [N] each."""
    axes = [
        torch.arange(size, dtype=torch.float64, device=device) * (wanted / size)
        for size, wanted in zip(grid, stretched_to, strict=True)
    ]
    y, x = torch.meshgrid(*axes, indexing="ij")
    return y.flatten(), x.flatten()
