"""Dropout as a pure function of the sample's position: the same on any topology, and when recomputed.

A mask has millions of bits, too many to draw on the host. The host draws a key of 64 bits for each sample and place
(`pretrain.draws`), and the device makes the mask of it by integer arithmetic: bit-identical on CPU and GPU, eager or
compiled, and whatever else is in the batch.
"""

import torch
from torch import Tensor

from pretrain.draws import Stream, integers, split64

PLACES = 3
"""Of a block, in this order: after the attention's projection, after the MLP's activation, after its second layer."""


def dropout_keys(seed: int, positions: Tensor, num_blocks: int) -> Tensor:
    """Keys of the masks: int32 [B, 1 + 3 * num_blocks, 2], on the host; the first is the stem's, then block by block.

    positions  int64 [B]  global sample positions, on the host: a position never comes twice in a run
    """
    low, high = split64(positions.numpy())
    places = 1 + PLACES * num_blocks
    return torch.from_numpy(integers(seed, Stream.DROPOUT, 2 * places, low, high)).reshape(-1, places, 2)


def dropout(x: Tensor, key: Tensor | None, rate: float) -> Tensor:
    """Set a share `rate` of the numbers of x [B, ...] to 0 and scale the rest so that the mean stays.

    key: int32 [B, 2], a sample's own; none, as in evaluation: nothing is dropped.
    """
    if key is None:
        return x
    keep = (_mixed(key, x[0].numel()) >= int(rate * 2**32) - 2**31).reshape(x.shape)
    return torch.where(keep, x * (1 / (1 - rate)), 0)


def _mixed(key: Tensor, count: int) -> Tensor:
    """Words that look uniform over all of int32: [B, 2] -> int32 [B, count].

    The counter goes through a two-round multiply-xorshift mix (constants of C. Wellons' `lowbias32`), one half of the
    key before each round. Products wrap; a shift of a signed word is made logical by a mask.
    """
    x = torch.arange(count, dtype=torch.int32, device=key.device) ^ key[:, :1]
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) + key[:, 1:]
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)
