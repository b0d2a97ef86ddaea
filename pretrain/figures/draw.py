"""Pictures of a `Look`: PNG files."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pretrain.figures.look import Look

_DPI = 110


def draw(found: Look, title: str, folder: Path) -> list[Path]:
    """Draw what was found into `folder`, which is made; returns the files. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_save(_filters(found), title, folder / "patch_filters.png")]
    if found.similarity is not None:
        drawn.append(_save(_positions(found), title, folder / "position_similarity.png"))
    if found.distance is not None:
        drawn.append(_save(_distances(found.distance), title, folder / "attention_distance.png"))
    if found.rollout is not None and found.images is not None:
        drawn.append(_save(_rollout(found.images, found.rollout), title, folder / "attention_rollout.png"))
    return drawn


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, title: str, path: Path) -> Path:
    figure.suptitle(title)
    figure.savefig(path, dpi=_DPI)
    return path


def _positions(found: Look) -> Any:
    """A tile for each patch: the cosine similarity of its position embedding with every other's."""
    assert found.similarity is not None
    rows, columns = found.model.grid
    tiles = found.similarity.reshape(rows, columns, rows, columns).numpy()
    gap = 1
    mosaic = np.full((rows * (rows + gap) - gap, columns * (columns + gap) - gap), np.nan)
    for r in range(rows):
        for c in range(columns):
            top, left = r * (rows + gap), c * (columns + gap)
            mosaic[top : top + rows, left : left + columns] = tiles[r, c]
    figure = _figure(7.2, 6.6)
    axes = figure.subplots()
    shown = axes.imshow(mosaic, vmin=-1, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set(title="similarity of position embeddings", xlabel="patch column", ylabel="patch row")
    axes.set_xticks(np.arange(columns) * (columns + gap) + (columns - 1) / 2, np.arange(columns) + 1)
    axes.set_yticks(np.arange(rows) * (rows + gap) + (rows - 1) / 2, np.arange(rows) + 1)
    figure.colorbar(shown, ax=axes, label="cosine similarity")
    return figure


def _filters(found: Look) -> Any:
    """The first principal components of the patch embedding's filters."""
    count = len(found.components)
    columns = min(7, count)
    rows = -(-count // columns)
    figure = _figure(1.25 * columns, 1.35 * rows + 0.6)
    for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).ravel()):
        axes.axis("off")
        if number < count:
            _show(axes, found.components[number].permute(1, 2, 0).numpy())
            axes.set_title(f"{found.shares[number]:.1%}", fontsize=8)
    figure.supxlabel(
        "principal components of the patch filters, and the variance that each explains", fontsize=9
    )
    return figure


def _distances(distance: Tensor) -> Any:
    """A dot for each head."""
    layers, heads = distance.shape
    figure = _figure(7, 5)
    axes = figure.subplots()
    for head in range(heads):
        axes.plot(np.arange(layers), distance[:, head].numpy(), "o", markersize=4, alpha=0.8)
    axes.plot(np.arange(layers), distance.mean(1).numpy(), "k-", linewidth=1, label="mean of the heads")
    axes.set(title="attention distance", xlabel="layer", ylabel="mean distance, pixels", ylim=(0, None))
    axes.set_xticks(np.arange(layers))
    axes.legend()
    return figure


def _rollout(images: Tensor, rollout: Tensor) -> Any:
    """Each image beside itself, dimmed where the head sees little of it."""
    count = len(images)
    figure = _figure(1.6 * count + 0.4, 3.9)
    axes = figure.subplots(2, count, squeeze=False)
    height, width = images.shape[1:3]
    for number in range(count):
        image, seen = images[number].numpy() / 255, rollout[number].numpy()
        brightness = np.kron(seen / seen.max(), np.ones((height // len(seen), width // len(seen[0]))))
        _show(axes[0, number], image)
        _show(axes[1, number], image * brightness[..., None])
    axes[0, 0].set_title("image", fontsize=9, loc="left")
    axes[1, 0].set_title("attention rollout", fontsize=9, loc="left")
    return figure


def _show(axes: Any, image: "np.ndarray[Any, Any]") -> None:
    """[H, W, C] in [0, 1]; other than three channels are shown as their mean, in grey."""
    axes.axis("off")
    grey = image.shape[-1] != 3
    axes.imshow(image.mean(-1) if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1)
