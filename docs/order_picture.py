"""Draws `order.svg`: the real order of a small data set, by the module that training uses. `python docs/order_picture.py`"""

import sys
from pathlib import Path

import numpy as np

from pretrain.config.plan import slice_bounds
from pretrain.data.order import Order, Rows

SHARDS, SAMPLES, BLOCK, WINDOW, LANES, BATCH, SEED = 4, 12, 3, 2, 2, 8, 7
RANKS = (2, 2, 2, 3, 3, 3)
"""Of each step: stopped after three, and gone on with on another number."""
HUES = (210, 28, 140, 320)
CELL, LEFT, WIDTH = 18, 150, 1070


def cell(x: float, y: float, shard: int, sample: int) -> str:
    """A sample: the colour is its shard, the shade its block, the number its place in the shard."""
    light = 82 if sample // BLOCK % 2 else 68
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{CELL}" height="{CELL}" fill="hsl({HUES[shard]},60%,{light}%)" stroke="#fff"/>'
        f'<text x="{x + CELL / 2:g}" y="{y + 13:g}" text-anchor="middle" font-size="10">{sample}</text>'
    )


def words(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="12">{text}</text>'


def frame(x: float, y: float, cells: int) -> str:
    box = f'x="{x - 1:g}" y="{y - 1:g}" width="{cells * CELL + 2}" height="{CELL + 2}"'
    return f'<rect {box} fill="none" stroke="#333" stroke-width="1.5" rx="2"/>'


def row(x: float, y: float, rows: Rows) -> str:
    places = zip(rows.shard.tolist(), rows.sample.tolist(), strict=True)
    return "".join(cell(x + i * CELL, y, *place) for i, place in enumerate(places))


def picture() -> str:
    """The SVG."""
    order = Order(
        [SAMPLES] * SHARDS,
        seed=SEED,
        global_batch=BATCH,
        lanes=LANES,
        block_samples=BLOCK,
        window_blocks=WINDOW,
    )
    batches = [order.batch(step) for step in range(len(RANKS))]
    parts = [words(LEFT - 10, 33, "the data set", "end")]
    for shard in range(SHARDS):
        x = LEFT + shard * (SAMPLES * CELL + 12)
        parts += [cell(x + i * CELL, 20, shard, i) for i in range(SAMPLES)]
        parts.append(words(x, 14, f"shard {shard}: {SAMPLES // BLOCK} blocks of {BLOCK} samples"))
    for lane in range(LANES):
        y, per_step = 86 + 34 * lane, BATCH // LANES
        mine = slice(lane * per_step, (lane + 1) * per_step)
        walked = Rows(
            *(np.concatenate([array[mine] for array in arrays]) for arrays in zip(*batches, strict=True))
        )
        parts += [words(LEFT - 10, y + 13, f"lane {lane}", "end"), row(LEFT, y, walked)]
        span = WINDOW * BLOCK
        parts += [frame(LEFT + at * CELL, y, span) for at in range(0, len(walked.shard), span)]
    parts.append(
        words(
            LEFT,
            76,
            f"epoch 0: shards, blocks and, in frames, samples of windows of {WINDOW} blocks are permuted",
        )
    )
    for step, (batch, ranks) in enumerate(zip(batches, RANKS, strict=True)):
        x, y = LEFT + step % 3 * (BATCH * CELL + 130), 178 + step // 3 * 52
        parts.append(row(x, y, batch))
        for rank in range(ranks):
            start, stop = slice_bounds(BATCH, rank, ranks)
            parts += [
                frame(x + start * CELL, y, stop - start),
                words(x + start * CELL, y - 5, f"rank {rank}" if ranks < 3 else f"r{rank}"),
            ]
        parts.append(words(x + BATCH * CELL + 8, y + 13, f"step {step}"))
    parts.append(words(LEFT - 10, 191, "on 2 ranks", "end"))
    parts.append(words(LEFT - 10, 243, "resumed on 3", "end"))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 262" font-family="sans-serif">\n'
        f'<rect width="{WIDTH}" height="262" fill="#fff"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    Path(sys.argv[1] if sys.argv[1:] else Path(__file__).with_name("order.svg")).write_text(picture())
