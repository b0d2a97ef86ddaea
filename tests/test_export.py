"""An export is loaded by the library it is for and answers the same, or it is not there."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import tiny
import torch
import vits
from click.testing import CliRunner
from PIL import Image
from saves import save
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from vits import random_images, random_weights

from pretrain.checkpoint.load import open_weights
from pretrain.checkpoint.save import Content
from pretrain.config import ModelConfig
from pretrain.distributed import joined
from pretrain.errors import CheckpointError, ExportError
from pretrain.export import export
from pretrain.formats import exporter
from pretrain.formats.files import About, Preprocess
from pretrain.formats.native import load_export
from pretrain.formats.timm_models import _mlp_ratio
from pretrain.formats.write import Exported, write_export
from pretrain.images import validation_images
from pretrain.model import build
from pretrain.shards import shards
from pretrain.world import World

LINEAGE = {"run": "runs/a", "step": 7, "metrics": {"val/top1": 0.5}}
ABOUT = About(LINEAGE)
OURS_AND_TIMM = ("safetensors", "timm")
"""The other formats have tests of their own, in tests/formats."""


def model(**changes: object) -> ModelConfig:
    """2 x 3 patches of 4 x 4 pixels."""
    settings = {
        "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_dim": 31, "img_size": (8, 12), "patch_size": (4, 4),
        "num_classes": 5,
    }  # fmt: skip
    return vits.tiny(**settings | changes)


def images(config: ModelConfig) -> Tensor:
    return random_images(config, 4)


def write(
    out: Path, form: str, config: ModelConfig | None = None, about: About = ABOUT, **options: object
) -> Exported:
    config = config or model()
    options.setdefault("images", images(config))
    return write_export(random_weights(config), config, about, out, form, **options)


VARIANTS = {
    "token": {},
    "cls without position": {"pos_embed_order": "pe_then_cls"},
    "mean, one channel": {"global_pool": "avg", "in_chans": 1, "mean": (0.3,), "std": (0.2,)},
    "attention pool, tanh": {"global_pool": "map", "act": "gelu_tanh", "mean": (0.5,), "std": (0.5,)},
    "patches of 4x2": {"patch_size": (4, 2)},
    "registers, LayerScale, qk-norm": {"num_registers": 2, "layer_scale": 0.1, "qk_norm": True},
    "registers without position": {"num_registers": 2, "pos_embed_order": "pe_then_cls", "act": "relu"},
    "swiglu": {"act": "swiglu", "mlp_dim": 20},
    "swiglu, everything": {"act": "swiglu", "layer_scale": 0.1, "num_registers": 1, "qk_norm": True},
    "no position": {"pos_embed": "none", "act": "elu"},
    "learned_2d": {"pos_embed": "learned_2d", "num_registers": 1, "act": "silu"},
    "learned_2d without cls": {"pos_embed": "learned_2d", "pos_embed_order": "pe_then_cls"},
    "sincos of MAE": {"pos_embed": "sincos_2d_mae"},
    "sincos of big_vision, mean": {"pos_embed": "sincos_2d_big_vision", "global_pool": "avg"},
    "mean of normalised patches": {"global_pool": "norm_avg", "num_registers": 1},
}
ONLY_OURS = {
    "rotary": {"pos_embed": "rope_2d", "rope_reference_grid": (4, 4)},
    "relative": {"pos_embed": "relative", "pos_embed_at": "every_layer"},
    "tables of every layer": {"pos_embed": "learned_2d", "pos_embed_at": "every_layer"},
    "tanh layer": {"representation_size": 8, "head_bias": -6.9},
    "gated attention pool": {"act": "swiglu", "global_pool": "map"},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("form", OURS_AND_TIMM)
def test_loaded_again_it_answers_the_same(tmp_path: Path, form: str, variant: dict[str, object]) -> None:
    config = model(**variant)
    done = write(tmp_path / "out", form, config)
    assert done.difference is not None
    assert done.difference <= 1e-5
    assert done.images == "4 images"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    files = ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in done.path.iterdir()) == files


@pytest.mark.parametrize("variant", ONLY_OURS.values(), ids=ONLY_OURS)
def test_what_timm_cannot_express_our_own_format_can(tmp_path: Path, variant: dict[str, object]) -> None:
    config = model(**variant)
    done = write(tmp_path / "out", "safetensors", config)
    assert done.difference is not None
    assert done.difference <= 1e-5
    assert load_export(done.path)[1] == config
    with pytest.raises(ExportError, match="use --format safetensors or onnx or mlflow"):
        write(tmp_path / "timm", "timm", config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_all_that_timm_cannot_express_is_said_at_once(tmp_path: Path) -> None:
    config = model(
        norm_eps=1e-5, pos_embed_at="every_layer", representation_size=8, act="swiglu", global_pool="map"
    )
    with pytest.raises(ExportError) as caught:
        write(tmp_path / "out", "timm", config)
    for name in ("norm_eps", "pos_embed_at", "representation_size", "global_pool map"):
        assert f"model.{name}" in str(caught.value)


def test_our_own_export_reloads_to_the_same_config_and_bits(tmp_path: Path) -> None:
    config = model(global_pool="map", drop_path_rate=0.1, norm_eps=1e-5)
    done = write(tmp_path / "out", "safetensors", config)
    loaded, loaded_config = load_export(done.path)
    assert loaded_config == config
    for name, value in random_weights(config).items():
        assert torch.equal(loaded.get_parameter(name), value)
    assert torch.equal(loaded(images(config)), build(config, random_weights(config))(images(config)))
    document = json.loads((done.path / "config.json").read_text())
    assert document["pretrain"]["input"]["mean"] == [0.1, 0.2, 0.3]
    assert document["pretrain"]["input"]["std"] == [0.4, 0.5, 0.6]
    assert document["pretrain"]["lineage"] == LINEAGE


def test_timm_s_own_transform_of_a_picture_gives_our_logits(tmp_path: Path) -> None:
    """Whoever loads the folder and follows timm's recipe gets the model that was trained, from file to logits."""
    config = model(img_size=(12, 12))
    done = write(tmp_path / "out", "timm", config, about=About(LINEAGE, Preprocess(0.9, "bicubic")))
    loaded = timm.create_model(f"local-dir:{done.path}", pretrained=True).eval()
    data = resolve_model_data_config(loaded)
    assert (data["crop_pct"], data["interpolation"]) == (0.9, "bicubic")
    assert data["input_size"] == (3, 12, 12)
    transform = create_transform(**data | {"crop_pct": 1.0})  # the picture has the model's size already
    picture = random_images(config, 1)
    pixels = transform(to_pil_image(picture[0].permute(2, 0, 1)))[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels), build(config, random_weights(config))(picture))


def test_a_timm_folder_can_be_fine_tuned_at_another_size_and_head(tmp_path: Path) -> None:
    done = write(tmp_path / "out", "timm")
    larger = timm.create_model(f"local-dir:{done.path}", pretrained=True, img_size=(16, 16), num_classes=3)
    assert larger(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    assert torch.equal(larger.blocks[1].mlp.fc1.bias, random_weights(model())["blocks.1.mlp.fc1.bias"])


def test_every_mlp_width_survives_timm_s_ratio() -> None:
    for width in (24, 192, 1152, 1408, 1664):
        for mlp_dim in range(width, width + 200):
            config = model(embed_dim=width, mlp_dim=mlp_dim)
            assert int(width * _mlp_ratio(config)) == mlp_dim


@pytest.mark.parametrize("form", OURS_AND_TIMM)
def test_an_export_that_answers_otherwise_is_not_kept(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is described with the other GELU than the weights are judged with."""
    adapt = exporter(form).adapt

    def misdescribe(weights: dict[str, Tensor], config: ModelConfig) -> tuple[object, ModelConfig]:
        return adapt(weights, config.model_copy(update={"act": "gelu_tanh"}))

    monkeypatch.setattr(exporter(form), "adapt", misdescribe)
    weights = random_weights(model(), std=2)
    with pytest.raises(ExportError, match="answers otherwise: its logits differ by"):
        write_export(weights, model(), ABOUT, tmp_path / "out", form, images=images(model()))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    weights = random_weights(model())
    weights["norm.weight"][0] = math.nan
    with pytest.raises(ExportError, match="differ by nan"):
        write_export(weights, model(), ABOUT, tmp_path / "out", "safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_timm_cannot_express_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError,
        match=r"use --format safetensors or transformers or onnx or mlflow:\n  - model\.norm_eps 1e-05",
    ):
        write(tmp_path / "out", "timm", model(norm_eps=1e-5))
    assert list(tmp_path.iterdir()) == []


def test_without_timm_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ExportError, match=r"pip install 'timm.*--no-verify"):
        write(tmp_path / "out", "timm")
    assert list(tmp_path.iterdir()) == []
    assert write(tmp_path / "out", "timm", verify=False).difference is None


def test_an_earlier_export_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write(out, "timm")
    write(out, "safetensors", model(num_classes=6))
    assert load_export(out)[1].num_classes == 6
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    for target in (mine, mine / "thesis.tex"):
        with pytest.raises(ExportError, match="exists and is not an export"):
            write(target, "timm")
    assert (mine / "thesis.tex").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_a_failed_export_leaves_the_earlier_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "safetensors")
    with pytest.raises(ExportError):
        write(out, "timm", model(norm_eps=1e-5))
    assert load_export(out)[1] == model()


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"cannot write to .*file.*--out"):
        write(tmp_path / "file" / "out", "timm")


def damage_config(change: dict[str, object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        document = json.loads(path.read_text())
        path.write_text(json.dumps({"pretrain": document["pretrain"] | change}))

    return damage


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "is damaged or was replaced"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{}"), "is not from `pretrain export"),
        (damage_config({"version": 99}), "has version 99; this release reads 2"),
        (damage_config({"model": {}}), "an export of a model that is not one"),
        (
            damage_config({"files": {"../x": [1, "0"], "model.safetensors": [1, "0"]}}),
            "outside of the folder",
        ),
        (damage_config({"files": {}}), "does not name its weights"),
        (damage_config({"model": model(depth=3).model_dump(mode="json")}), r"blocks\.2\.norm1"),
    ],
    ids=[
        "bit",
        "no weights",
        "no config",
        "cut config",
        "foreign config",
        "version",
        "empty model",
        "outside",
        "no hashes",
        "depth",
    ],
)
def test_a_damaged_export_is_named_and_not_loaded(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    done = write(tmp_path / "out", "safetensors")
    damage(done.path)
    with pytest.raises(CheckpointError, match=message):
        load_export(done.path)


def test_help_is_there_without_torch() -> None:
    code = (
        "import sys; from pretrain.export import export; "
        "export.main(['--help'], standalone_mode=False); "
        "assert not {'torch', 'pydantic', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--format [safetensors|timm|transformers|bigvision|onnx|mlflow]" in done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint of random weights, and the validation shards that its config names."""
    folder = tmp_path_factory.mktemp("run")
    generator = np.random.default_rng(0)
    for label in range(5):
        (folder / "images" / str(label)).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (8, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / str(label) / f"{number}.png")
    arguments = [str(folder / "images"), str(folder / "data"), "--val-share", "0.5", "--shards", "1"]
    packed = CliRunner().invoke(shards, ["pack", *arguments])
    assert packed.exit_code == 0, packed.output
    config = tiny.config(
        run={"dir": str(folder)},
        data={
            "train": {"shards": str(folder / "data" / "train")},
            "val": {"shards": str(folder / "data" / "val")},
        },
        model=model().model_dump(),
    )
    weights = random_weights(config.model)
    content = Content(
        step=7,
        config=config,
        plan=tiny.plan(config, 1),
        data={},
        progress={},
        metrics={"val/top1": 0.5},
        optimizer_steps=7,
        shapes={name: tuple(value.shape) for name, value in weights.items()},
        slices=[(name, 0, value.numel(), {"weight": value.flatten()}) for name, value in weights.items()],
    )
    with joined(World(0, 1, 0, "127.0.0.1", 0, "test"), torch.device("cpu"), 60) as ranks:
        save(folder, content, ranks)
    return folder


@pytest.mark.parametrize("form", OURS_AND_TIMM)
def test_the_command_proves_an_export_on_the_run_s_own_images(run: Path, form: str) -> None:
    done = CliRunner().invoke(export, [str(run), "--format", form], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"parameters of step 7 in {run}/export/{form}" in done.output
    number_of_images = len(validation_images(open_weights(run).config))
    assert 0 < number_of_images < 16
    assert f"at most, on {number_of_images} images" in done.output
    ours = json.loads((run / "export" / form / "config.json").read_text())["pretrain"]
    assert ours["class_names"] == ["0", "1", "2", "3", "4"]
    lineage = ours["lineage"]
    assert lineage["step"] == 7
    assert len(lineage["train_digest"]) == 64
    assert lineage["metrics"] == {"val/top1": 0.5}


def test_the_command_takes_a_step_folder_and_needs_no_images(run: Path, tmp_path: Path) -> None:
    (run / "data" / "val").rename(run / "data" / "elsewhere")
    try:
        arguments = [str(run / "checkpoints" / "step_00000007")]
        with pytest.raises(ExportError, match="say where to write with --out"):
            CliRunner().invoke(export, arguments, catch_exceptions=False)
        arguments += ["--out", str(tmp_path / "out")]
        done = CliRunner().invoke(export, arguments, catch_exceptions=False)
        assert "on noise (no images at hand)" in done.output
        done = CliRunner().invoke(export, [*arguments, "--no-verify"], catch_exceptions=False)
        assert "not verified" in done.output
    finally:
        (run / "data" / "elsewhere").rename(run / "data" / "val")


def test_a_command_on_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not a run directory"):
        CliRunner().invoke(export, [str(tmp_path)], catch_exceptions=False)
