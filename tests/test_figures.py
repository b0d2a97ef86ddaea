"""Figures show what the paper says they show, for every kind of model, and the same in training at ZeRO stage 3."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from digits import digits
from PIL import Image
from ranks import on_ranks
from test_resume import config, train
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from vits import random_images, random_weights, tiny

from pretrain.config import ModelConfig
from pretrain.errors import CheckpointError
from pretrain.figures import attention_of, draw, look, needed_weights, numbers
from pretrain.figures.attention import attention_weights
from pretrain.model import InitialWeights, build, learned_table
from pretrain.model.vit import Attention
from pretrain.show import show

__all__ = ["digits"]


def model(**changes: object) -> ModelConfig:
    """3 x 4 patches of 4 x 2 pixels."""
    return tiny(**{"embed_dim": 24, "num_heads": 2, "img_size": (12, 8)} | changes)


def test_positions_of_a_row_and_a_column_are_as_alike_as_their_table_makes_them() -> None:
    config = model(pos_embed="learned_2d")
    rows, columns = config.grid
    axes = {"pos_embed_x": torch.eye(columns, 12)[None], "pos_embed_y": torch.eye(rows, 12)[None]}
    axes["pos_embed_prefix"] = torch.zeros(1, 1, 24)
    table = learned_table(axes.__getitem__, config)[0, 1:]
    similar = numbers.similarity(table)
    assert similar.shape == (12, 12)
    near = numbers.neighbours(similar, config.grid)
    assert near == pytest.approx((0.5, 0.5, 0.0))  # one of two halves in common, or none


def test_components_are_those_of_the_covariance() -> None:
    filters = torch.randn(40, 3, 4, 2, generator=torch.Generator().manual_seed(1))
    components, shares = numbers.principal_components(filters)
    flat = filters.flatten(1).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(flat.T))
    assert shares.numpy() == pytest.approx(values[::-1] / values.sum(), abs=1e-5)
    assert components.shape == (24, 3, 4, 2)
    first = components[0].flatten().double().numpy()
    assert abs(np.corrcoef(first, vectors[:, -1])[0, 1]) == pytest.approx(1, abs=1e-5)
    assert components.amin() == 0
    assert components.amax() == 1


def test_distance_is_in_pixels_between_centres_of_patches() -> None:
    grid, patch, prefix = (3, 4), (4, 2), 2
    places = [(r * 4, c * 2) for r in range(3) for c in range(4)]
    mean = np.mean([math.dist(a, b) for a in places for b in places])
    weights = torch.full((2, 1, 14, 14), 1 / 14)
    assert numbers.attention_distance(weights, grid, patch, prefix).tolist() == pytest.approx([mean])
    own = torch.eye(14).expand(2, 3, 14, 14)
    assert numbers.attention_distance(own, grid, patch, prefix).tolist() == [0, 0, 0]


def test_rollout_multiplies_the_layers_and_keeps_the_residual_path() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(2, 3, 7, 7, generator=generator).softmax(-1) for _ in range(3)]
    mixed = None
    expected = np.eye(7)[None]
    for weights in layers:
        mixed = numbers.rolled(mixed, weights)
        expected = (weights.mean(1).numpy() + np.eye(7)) / 2 @ expected
    assert mixed is not None
    assert mixed.numpy() == pytest.approx(expected, abs=1e-6)
    seen = numbers.seen_by_the_head(mixed, (2, 3), 1, has_cls_token=True)
    assert seen.shape == (2, 2, 3)
    assert seen.flatten(1).numpy() == pytest.approx(
        expected[:, 0, 1:] / expected[:, 0, 1:].sum(-1)[:, None], abs=1e-6
    )


KINDS: list[dict[str, object]] = [
    {},
    {"pos_embed": "rope_2d", "qk_norm": True},
    {"pos_embed": "relative", "pos_embed_at": "every_layer", "num_registers": 2},
    {"pos_embed": "sincos_2d_mae", "global_pool": "avg"},
    {"pos_embed": "learned_2d", "pos_embed_at": "every_layer", "global_pool": "map"},
    {"pos_embed": "none"},
]


class Told(nn.Module):
    """In the place of the output layer: keeps what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        self.given = x
        return torch.zeros_like(x)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_heard_is_what_the_fused_kernel_weighs_the_values_by(kind: dict[str, object]) -> None:
    of = model(**kind)
    net = build(of, InitialWeights(of, 3)).eval()
    for parameter in net.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    heard: list[tuple[Attention, Tensor, Tensor]] = []
    for block in net.blocks:
        layer, told = block.attn, Told()
        layer.proj = told
        layer.qkv.register_forward_hook(
            lambda _, __, out, layer=layer: heard.append((layer, out, torch.empty(0)))
        )
        layer.listener = lambda *given: heard.append((*heard.pop()[:2], attention_weights(*given)))
    net(random_images(of))
    assert len(heard) == 3
    for layer, qkv, weights in heard:
        v = qkv.unflatten(-1, (3, of.heads, -1))[:, :, 2].transpose(1, 2)
        assert weights.sum(-1).detach().numpy() == pytest.approx(1, abs=1e-5)
        assert torch.allclose((weights @ v).transpose(1, 2).flatten(2), layer.proj.given, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_model_can_be_looked_into(kind: dict[str, object], tmp_path: Path) -> None:
    of = model(**kind)
    weights = InitialWeights(of, 0)
    net, shown = build(of, weights).eval(), random_images(of)
    with torch.no_grad():
        before = net(shown)
        with attention_of(net) as heard:
            assert torch.equal(net(shown), before), "listening changes nothing"
    found = look(of, {name: weights[name] for name in needed_weights(of)}, shown, heard)
    assert found.distance is not None
    assert found.distance.shape == (3, 2)
    has_table = of.pos_embed.startswith(("learned", "sincos"))
    assert (found.similarity is not None) == has_table
    drawn = draw(found, "a model", tmp_path)
    assert len(drawn) == (4 if has_table else 3)
    for path in drawn:
        assert min(Image.open(path).size) > 200
    assert all(math.isfinite(value) for value in found.metrics().values())
    assert not any(isinstance(m, Attention) and m.listener for m in net.modules())


class Largest(TorchDispatchMode):
    """Keeps how many numbers the largest tensor that was made has."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, made.numel() if isinstance(made, Tensor) else 0)
        return made


def test_attention_is_heard_image_by_image_and_is_that_of_all_at_once() -> None:
    """At a high resolution the weights [B, h, T, T] of all images have no room beside a training."""
    of = model(img_size=(48, 24), num_heads=4)  # 144 patches
    net, shown = build(of, random_weights(of)).eval(), random_images(of, 5)
    with Largest() as largest, attention_of(net) as heard:
        net(shown)
    assert largest.numbers < 5 * 4 * of.num_tokens**2 / 2
    at_once: list[Tensor] = []
    for block in net.blocks:
        block.attn.listener = lambda *given: at_once.append(attention_weights(*given))
    with torch.no_grad():
        net(shown)
    mixed = None
    for layer, weights in enumerate(at_once):
        distance = numbers.attention_distance(weights, of.grid, of.patch_size, of.num_prefix_tokens)
        torch.testing.assert_close(heard.distance[layer], distance)
        mixed = numbers.rolled(mixed, weights)
    assert mixed is not None
    torch.testing.assert_close(heard.rollout, numbers.seen_by_the_head(mixed, of.grid, 1, has_cls_token=True))


def test_listening_does_not_compile_the_blocks_anew() -> None:
    of = model()
    net, shown = build(of, InitialWeights(of, 0)), random_images(of)
    for block in net.blocks:
        block.compile(dynamic=False, backend="eager")
    counts = []
    for _ in range(2):
        net(shown)
        counts.append(counters["stats"]["unique_graphs"])
        with attention_of(net) as heard:
            net(shown)
        assert len(heard.distance) == 3
    assert counts[1] == counts[0] > 0


def test_figures_in_training_at_stage_3_are_those_of_the_checkpoint(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    length = {"global_batch": 22, "micro_batch": 6, "total_steps": 12, "figures_every_steps": 8}
    cfg = config(run, digits, stage=3, train=length, model={"in_chans": 1, "num_classes": 10})
    assert on_ranks(2, train, cfg)[0] == ("finished", 12)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [record["path"] for record in records if record["op"] == "artifact"]
    for step in (8, 12):
        for name in ("patch_filters", "position_similarity", "attention_distance", "attention_rollout"):
            assert f"figures/step_{step:08d}/{name}.png" in kept
            assert (run / f"figures/step_{step:08d}/{name}.png").is_file()
    tracked = {
        name: value
        for record in records
        if record["op"] == "metrics" and record["step"] == 12
        for name, value in record["values"].items()
        if name.startswith("figures/")
    }
    assert len(tracked) == 5  # three of positions, one of each layer
    shown = CliRunner().invoke(show, [str(run), "--out", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    for name, value in tracked.items():
        assert f"{value:.3f}" in next(line for line in shown.output.splitlines() if name[8:] in line)
    assert len(list((tmp_path / "out").glob("*.png"))) == 4


def test_a_grid_of_one_row_has_no_number_for_pairs_that_it_lacks() -> None:
    of = model(img_size=(4, 8))
    found = look(
        of, {name: value for name, value in random_weights(of).items() if name in needed_weights(of)}
    )
    assert set(found.metrics()) == {"figures/pe_similarity/same_row"}


def test_weights_that_are_not_finite_are_named_and_not_drawn() -> None:
    of = model()
    weights = random_weights(of)
    weights["patch_embed.proj.weight"][0] = math.nan
    with pytest.raises(CheckpointError, match=r"nothing to draw: patch_embed\.proj\.weight has values"):
        look(of, {name: weights[name] for name in needed_weights(of)})


def test_where_nothing_can_be_drawn_training_goes_on_and_show_says_so(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    length = {"global_batch": 22, "micro_batch": 6, "total_steps": 12, "figures_every_steps": 12}
    cfg = config(run, digits, train=length, model={"in_chans": 1, "num_classes": 10, "pos_embed": "none"})
    run.mkdir()
    (run / "figures").write_text("in the way")
    assert on_ranks(1, train, cfg)[0] == ("finished", 12)
    failed = CliRunner().invoke(show, [str(run)])
    assert "cannot draw into" in str(failed.exception)
    (run / "figures").unlink()
    shown = CliRunner().invoke(show, [str(run)])
    assert "none adds no table to the patches" in shown.output
    assert (run / "figures" / "step_00000012" / "patch_filters.png").is_file()
