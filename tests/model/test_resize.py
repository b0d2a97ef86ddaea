"""Resizing a position table against three implementations that are not ours."""

import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

from pretrain.model import resize_pos_embed

GRIDS = [(4, 4), (7, 7), (3, 5), (8, 2), (16, 16), (8, 32), (1, 6)]
CASES = [
    (old, new, prefix) for old, new in itertools.product(GRIDS, GRIDS) if old != new for prefix in (0, 1, 5)
]
KERNELS = ("bicubic_antialias", "bicubic", "bilinear", "align_corners")


def table(grid: tuple[int, int], prefix: int, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(grid[0] * 100 + grid[1])
    return torch.randn(1, prefix + grid[0] * grid[1], width, generator=generator)


@pytest.mark.parametrize(
    ("kernel", "mode", "antialias"),
    [
        ("bicubic_antialias", "bicubic", True),
        ("bicubic", "bicubic", False),
        ("bilinear", "bilinear", False),
    ],
)
def test_half_pixel_kernels_equal_timm(kernel: str, mode: str, antialias: bool) -> None:
    for old, new, prefix in CASES:
        source = table(old, prefix)
        expected = resample_abs_pos_embed(
            source, list(new), list(old), prefix, interpolation=mode, antialias=antialias
        )
        assert torch.equal(resize_pos_embed(source, old, new, prefix, kernel), expected), (old, new, prefix)


def test_align_corners_equals_scipy_zoom() -> None:
    for old, new, prefix in CASES:
        source = table(old, prefix)
        grid = source[0, prefix:].reshape(*old, -1).double().numpy()
        zoom = (new[0] / old[0], new[1] / old[1], 1)
        # mode: at some sizes (32 -> 16) scipy's last coordinate rounds past the edge and its default gives 0 there.
        expected = scipy.ndimage.zoom(grid, zoom, order=1, mode="nearest").reshape(-1, source.shape[-1])
        got = resize_pos_embed(source, old, new, prefix, "align_corners")
        np.testing.assert_allclose(got[0, prefix:].numpy(), expected, atol=1e-5, err_msg=f"{old} {new}")
        assert torch.equal(got[0, :prefix], source[0, :prefix])


def test_bicubic_equals_torch_on_channels_first() -> None:
    source = table((4, 5), 1)
    channels_first = source[:, 1:].transpose(1, 2).reshape(1, 6, 4, 5)
    expected = F.interpolate(channels_first, (7, 3), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(resize_pos_embed(source, (4, 5), (7, 3), 1, "bicubic")[:, 1:], expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_grid_is_the_same_bits(kernel: str) -> None:
    source = table((3, 5), 1)
    assert torch.equal(resize_pos_embed(source, (3, 5), (3, 5), 1, kernel), source)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_grid_of_as_many_tokens_is_still_resized(kernel: str) -> None:
    """8x32 and 16x16 both have 256 tokens; code that compares lengths leaves the table as it was."""
    ramp = torch.arange(8.0).repeat_interleave(32)[None, :, None]  # a row knows its height
    resized = resize_pos_embed(ramp, (8, 32), (16, 16), 0, kernel).reshape(16, 16)
    assert torch.allclose(resized, resized[:, :1].expand(16, 16), atol=1e-5)
    assert (resized[1:, 0] - resized[:-1, 0] > -1e-5).all()
    assert resized[-1, 0] - resized[0, 0] > 6


def test_kernels_differ_where_the_field_confuses_them() -> None:
    source = table((14, 14), 0)
    resized = [resize_pos_embed(source, (14, 14), (24, 24), 0, kernel) for kernel in KERNELS]
    for one, other in itertools.combinations(resized, 2):
        assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("kernel", KERNELS)
def test_computed_in_float32_and_given_back_in_the_table_s_type(kernel: str) -> None:
    source = table((4, 4), 1).bfloat16()
    resized = resize_pos_embed(source, (4, 4), (7, 7), 1, kernel)
    expected = resize_pos_embed(source.float(), (4, 4), (7, 7), 1, kernel)
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized, expected.bfloat16())


def test_a_leading_axis_is_kept_or_absent() -> None:
    source = table((4, 4), 1)
    batched = resize_pos_embed(source, (4, 4), (2, 8), 1, "bilinear")
    assert torch.equal(resize_pos_embed(source[0], (4, 4), (2, 8), 1, "bilinear"), batched[0])


def test_a_table_of_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="17 rows is not a grid of 4x4 and 0 prefix rows"):
        resize_pos_embed(table((4, 4), 1), (4, 4), (7, 7), 0, "bilinear")
