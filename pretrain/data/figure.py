"""A picture of what a data set holds: balance of the classes, sides, bytes, formats."""

from pathlib import Path

import numpy as np

from pretrain.data.stats import Stats

_BINS = 60
_NAMED_CLASSES = 30


def draw(stats: Stats, title: str, path: Path) -> None:
    """Write four panels as PNG (or whatever the ending of `path` says); raises `OSError`, and `ValueError` for an
    ending that matplotlib does not know."""
    from matplotlib.figure import Figure

    table = stats.seen.table
    figure = Figure(figsize=(11, 7), layout="constrained")
    looked_at = "" if stats.looked_at == stats.samples else f", {stats.looked_at:,} looked at"
    figure.suptitle(f"{title}: {stats.samples:,} samples in {stats.shards:,} shards{looked_at}")
    classes, sides, sizes, kinds = figure.subplots(2, 2).ravel()

    counts = stats.per_class
    order = np.argsort(-counts, kind="stable")
    classes.bar(np.arange(len(counts)), counts[order], width=1.0 if len(counts) > _NAMED_CLASSES else 0.8)
    classes.set(title=f"images of each of {len(counts):,} classes", ylabel="images", ylim=(0, None))
    if len(counts) <= _NAMED_CLASSES:
        names = [stats.name(int(label))[:14] for label in order]
        classes.set_xticks(np.arange(len(counts)), names, rotation=60, ha="right")
    else:
        classes.set(xlabel="classes, the largest first")

    edges = np.linspace(0, max(table["width"].max(), table["height"].max()) + 1, _BINS)
    for side in ("width", "height"):
        sides.hist(table[side], bins=edges.tolist(), histtype="step", linewidth=1.5, label=side)
    sides.set(title="sides as stored", xlabel="pixels", ylabel="images")
    sides.legend()

    sizes.hist(table["bytes"] / 1024, bins=_BINS)
    sizes.set(title="size of the image files", xlabel="KiB", ylabel="images")

    named = stats.seen.kinds.most_common()
    kinds.barh([f"{form} {mode}" for (form, mode), _ in named], [count for _, count in named])
    kinds.invert_yaxis()
    kinds.set(title="formats", xlabel="images")
    figure.savefig(path, dpi=110)
