"""Resizing positions and patch filters against implementations that are not ours: timm, torch, scipy, transformers.

Every kernel meets every pair of the grids below with 0, 1 and 5 prefix rows: 126 cases each.
"""

import itertools
import math

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTEmbeddings

from pretrain.model import resize_axis, resize_patch_filters, resize_pos_embed, resize_relative

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


def test_bicubic_equals_transformers_where_it_can_start_from() -> None:
    """Its source is always a square with one prefix row; the target may be anything."""
    targets = [(rows, columns) for rows in range(3, 15) for columns in (2, 5, 11, 16)]
    for side in (4, 7, 14):
        source = table((side, side), 1)
        config = ViTConfig(hidden_size=6, num_attention_heads=1, image_size=4 * side, patch_size=4)
        peer = ViTEmbeddings(config)
        peer.position_embeddings.data = source
        for rows, columns in targets:
            tokens = torch.zeros(1, 1 + rows * columns, 6)
            with torch.no_grad():
                expected = peer.interpolate_pos_encoding(tokens, 4 * rows, 4 * columns)
            if (rows, columns) != (side, side):
                got = resize_pos_embed(source, (side, side), (rows, columns), 1, "bicubic")
                torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


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


def test_the_bug_of_guessing_a_square_source() -> None:
    """196 rows are 7x28 as well as 14x14: a square root takes them for the square and mixes up rows and columns."""
    ramp = torch.arange(28.0).repeat(7)[None, :, None]  # a row knows its column
    right = resize_pos_embed(ramp, (7, 28), (10, 10), 0, "bilinear").reshape(10, 10)
    assert torch.allclose(right, right[:1].expand(10, 10), atol=1e-5)
    guessed = resize_pos_embed(ramp, (14, 14), (10, 10), 0, "bilinear").reshape(10, 10)
    assert (guessed - right).abs().max() > 5


def test_the_bug_of_comparing_lengths() -> None:
    """transformers returns a square table as it is for any other square image of as many tokens; with one of our
    width and height swapped, an unchanged table would have the right length and the wrong places."""
    source = table((8, 32), 1)
    resized = resize_pos_embed(source, (8, 32), (32, 8), 1, "bicubic")
    assert resized.shape == source.shape
    assert not torch.allclose(resized, source, atol=0.1)
    assert torch.equal(resized[:, :1], source[:, :1])


@pytest.mark.parametrize(("old", "new"), [(7, 61), (61, 60), (11, 15), (14, 61)])
def test_the_bug_of_rounding_a_scale_factor(old: int, new: int) -> None:
    """Asked for 61 rows as 7 times 61 / 7, torch gives 60; a size has to be asked for by its number."""
    assert resize_pos_embed(table((old, 3), 0), (old, 3), (new, 3), 0, "bicubic").shape == (1, new * 3, 6)
    short = [(a, b) for a in range(7, 80) for b in range(7, 80) if math.floor(a * (b / a)) != b]
    assert short[0] == (7, 61)
    for a, b in short:
        rows = F.interpolate(torch.zeros(1, 1, a, 1), scale_factor=(b / a, 1.0), mode="bicubic").shape[2]
        assert rows == b - 1
        assert resize_pos_embed(table((a, 1), 0), (a, 1), (b, 1), 0, "bicubic").shape[1] == b


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_axis_alone_is_the_grid_at_once(kernel: str) -> None:
    """learned_2d: X and Y each along its own axis, or written out as a grid and resized by timm's function."""
    for old, new in itertools.product(GRIDS, GRIDS):
        x, y = table((1, old[1]), 0, 3), table((1, old[0]), 0, 3)
        grid = torch.cat(
            [x[:, None].expand(-1, old[0], -1, -1), y[:, :, None].expand(-1, -1, old[1], -1)], -1
        )
        expected = resize_pos_embed(grid.flatten(1, 2), old, new, 0, kernel).reshape(1, *new, 6)
        got_x, got_y = resize_axis(x, new[1], kernel), resize_axis(y, new[0], kernel)
        atol = 1e-5
        assert torch.allclose(expected[..., :3], got_x[:, None].expand(-1, new[0], -1, -1), atol=atol), (
            old,
            new,
        )
        assert torch.allclose(expected[..., 3:], got_y[:, :, None].expand(-1, -1, new[1], -1), atol=atol), (
            old,
            new,
        )


def by_pairs(rel_pos: torch.Tensor, grid: tuple[int, int]) -> dict[tuple[int, int], torch.Tensor]:
    """The embedding of each step (dr, dc) between two patches of a grid, found by going through the pairs."""
    places = list(itertools.product(range(grid[0]), range(grid[1])))
    found = {}
    for (i, (r, c)), (j, (s, d)) in itertools.product(enumerate(places), enumerate(places)):
        found[r - s, c - d] = rel_pos[i - j + len(places) - 1]
    return found


@pytest.mark.parametrize("kernel", KERNELS)
def test_offsets_are_resized_as_steps_on_the_grid(kernel: str) -> None:
    """Against a walk over all pairs of patches, with timm's function for Swin's tables in between for bicubic."""
    for old, new in itertools.product([(4, 4), (3, 5), (1, 6), (8, 2), (5, 1)], repeat=2):
        generator = torch.Generator().manual_seed(0)
        rel_pos = torch.randn(2 * old[0] * old[1] - 1, 2, generator=generator)
        got = resize_relative(rel_pos, old, new, kernel)
        if old == new:
            assert torch.equal(got, rel_pos)
            continue
        steps = by_pairs(rel_pos, old)
        size, wanted = ((2 * g[0] - 1, 2 * g[1] - 1) for g in (old, new))
        laid_out = torch.stack([steps[k] for k in sorted(steps)]).reshape(*size, 2).permute(2, 0, 1)
        if kernel == "bicubic":
            moved = resize_rel_pos_bias_table_simple(laid_out, new, (2, *wanted))
        else:
            flat = laid_out.flatten(1).T[None]
            moved = resize_pos_embed(flat, size, wanted, 0, kernel)[0].T.reshape(2, *wanted)
        places = list(itertools.product(range(new[0]), range(new[1])))
        sums = {o: [] for o in range(2 * len(places) - 1)}
        for (i, (r, c)), (j, (s, d)) in itertools.product(enumerate(places), enumerate(places)):
            sums[i - j + len(places) - 1].append(moved[:, r - s + new[0] - 1, c - d + new[1] - 1])
        expected = torch.stack([torch.stack(sums[o]).mean(0) for o in sorted(sums)])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_no_offset_stays_no_offset_and_a_mirrored_table_stays_mirrored() -> None:
    distance = torch.arange(-8.0, 9.0).abs()[:, None]  # 3x3 patches
    resized = resize_relative(distance, (3, 3), (5, 5), "bilinear")[:, 0]
    assert torch.allclose(resized, resized.flip(0), atol=1e-5)
    assert resized.argmin() == 24


def test_offsets_of_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="17 offset embeddings do not belong to a grid of 4x4"):
        resize_relative(torch.zeros(17, 2), (4, 4), (7, 7), "bilinear")


SIZES = [(4, 4), (8, 8), (16, 16), (3, 5), (14, 14), (6, 2)]


@pytest.mark.parametrize(
    ("kernel", "mode", "antialias"),
    [
        ("bicubic_antialias", "bicubic", True),
        ("bicubic", "bicubic", False),
        ("bilinear", "bilinear", False),
    ],
)
def test_patch_filters_equal_timm(kernel: str, mode: str, antialias: bool) -> None:
    for old, new in itertools.product(SIZES, SIZES):
        weight = torch.randn(5, 3, *old, generator=torch.Generator().manual_seed(0))
        expected = resample_patch_embed(weight, list(new), interpolation=mode, antialias=antialias)
        got = resize_patch_filters(weight, new, kernel)
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_resized_filters_answer_resized_patches_as_before(kernel: str) -> None:
    """FlexiViT's equation 2: <B x, w'> = <x, w> for every x where the patch grows; nearest to it where it shrinks."""
    generator = torch.Generator().manual_seed(0)
    mode, align, antialias = {
        "bicubic_antialias": ("bicubic", False, True),
        "bicubic": ("bicubic", False, False),
        "bilinear": ("bilinear", False, False),
        "align_corners": ("bilinear", True, False),
    }[kernel]

    def answers(patches: torch.Tensor, weight: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        resized = F.interpolate(patches, size, mode=mode, align_corners=align, antialias=antialias)
        return resized.double().flatten(1) @ weight.double().flatten(1).T

    for old, new in [
        ((4, 4), (8, 8)),
        ((3, 5), (6, 7)),
        ((4, 4), (4, 9)),
        ((8, 8), (4, 4)),
        ((8, 4), (5, 3)),
    ]:
        weight = torch.randn(5, 3, *old, generator=generator)
        patches = torch.randn(4000, 3, *old, generator=generator)
        moved = resize_patch_filters(weight, new, kernel)
        before, after = answers(patches, weight, old), answers(patches, moved, new)
        error = (after - before).square().mean()
        if new[0] >= old[0] and new[1] >= old[1]:
            assert error < 1e-8, (old, new)
        else:
            for _ in range(3):  # no filter nearby does better
                other = moved + 0.05 * torch.randn(moved.shape, generator=generator)
                assert (answers(patches, other, new) - before).square().mean() > error


def test_filters_of_the_same_size_keep_their_bits_and_others_their_dtype() -> None:
    weight = torch.randn(2, 3, 4, 4).bfloat16()
    assert resize_patch_filters(weight, (4, 4), "bilinear") is weight
    assert resize_patch_filters(weight, (8, 8), "bilinear").dtype == torch.bfloat16


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
