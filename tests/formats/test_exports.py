"""Every format holds what it says it can, proven by its own library; what it cannot, it refuses with a way out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from peers import ABOUT, SQUARE, WIDE, model, photographs, random_weights, write
from transformers import AutoImageProcessor, AutoModelForImageClassification

from pretrain.errors import ExportError
from pretrain.formats import EXPORTS, exporter
from pretrain.formats.adapt import renormalised
from pretrain.formats.files import About, Preprocess
from pretrain.model import build

MODELS: dict[str, dict[str, Any]] = {
    "cls": {},
    "cls, GELU": {"act": "gelu"},
    "cls without position": {"pos_embed_order": "pe_then_cls"},
    "mean": {"global_pool": "avg"},
    "mean of normalised": {"global_pool": "norm_avg"},
    "attention pool": {"global_pool": "map"},
    "one channel": {"in_chans": 1, "mean": (0.3,), "std": (0.2,)},
    "LayerScale": {"layer_scale": 0.1},
    "tanh layer": {"representation_size": 24},
    "no positions": {"pos_embed": "none"},
    "learned_2d": {"pos_embed": "learned_2d"},
    "sincos": {"pos_embed": "sincos_2d_big_vision"},
    "rope, registers": {"pos_embed": "rope_2d", "num_registers": 2},
    "relative": {"pos_embed": "relative", "pos_embed_at": "every_layer", "global_pool": "avg"},
    "swiglu, qk-norm": {"act": "swiglu", "qk_norm": True, "global_pool": "avg", "num_registers": 2},
    "relu, epsilon": {"act": "relu", "norm_eps": 1e-5},
    "elu": {"act": "elu"},
    "silu": {"act": "silu"},
}
HOLDS = {
    "transformers": {"cls", "cls, GELU", "cls without position", "one channel", "LayerScale", "no positions", "learned_2d",
                     "sincos", "relu, epsilon", "silu"},
    "bigvision": {"cls", "cls without position", "mean of normalised", "attention pool", "one channel", "LayerScale",
                  "tanh layer", "no positions", "learned_2d", "sincos"},
    "onnx": set(MODELS),
    "mlflow": set(MODELS),
    "timm": set(MODELS) - {"tanh layer", "rope, registers", "relative", "relu, epsilon"},
    "safetensors": set(MODELS),
}  # fmt: skip
SLOWLY = ("onnx", "mlflow")
"""Seconds for each model: one that is hard to trace is tested here, all of them in the slow tests."""
CHOSEN = ("relative",)
PAIRS = [(form, name) for form in HOLDS for name in MODELS if form not in SLOWLY or name in CHOSEN]


def check(form: str, config: Any, folder: Path, able: bool) -> float | None:
    """The largest difference of an export, or None where it was refused; nothing is left of that."""
    if not able:
        with pytest.raises(ExportError, match=r"use --format .*safetensors.*:\n  - model\."):
            write(folder / "out", form, config)
        assert list(folder.iterdir()) == []
        return None
    done = write(folder / "out", form, config)
    assert sorted(path.name for path in folder.iterdir()) == ["out"]
    assert done.difference is not None
    assert done.difference <= 1e-5
    return done.difference


@pytest.mark.parametrize(("form", "name"), PAIRS, ids=[f"{form}-{name}" for form, name in PAIRS])
def test_an_export_gives_the_trained_model_s_logits_or_a_reason(tmp_path: Path, form: str, name: str) -> None:
    shape = WIDE if list(MODELS).index(name) % 2 else SQUARE
    check(form, model(**MODELS[name] | shape), tmp_path, name in HOLDS[form])


@pytest.mark.slow
@pytest.mark.parametrize("form", HOLDS)
@pytest.mark.parametrize("shape", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.timeout(900)
def test_every_format_with_every_model_on_every_shape(
    tmp_path: Path, form: str, shape: dict[str, Any]
) -> None:
    """Prints the table of largest differences: `pytest -m slow -s`."""
    for name in MODELS:
        (folder := tmp_path / name).mkdir()
        difference = check(form, model(**MODELS[name] | shape), folder, name in HOLDS[form])
        said = "refused" if difference is None else f"{difference:.1e}"
        print(f"export {form:12} {name:22} {shape['img_size']!s:9} {said}")


@pytest.mark.slow
@pytest.mark.parametrize("form", EXPORTS)
@pytest.mark.parametrize("size", ["Ti", "S", "B"])
def test_published_sizes_are_exported(tmp_path: Path, form: str, size: str) -> None:
    from pretrain.config import ModelConfig

    config = ModelConfig(
        size=size, img_size=(224, 224), patch_size=(16, 16), num_classes=1000, act="gelu_tanh"
    )
    done = write(tmp_path / "out", form, config)
    print(f"export {form:12} {size}/16 at 224: {done.difference:.1e}")


def test_a_refusal_names_only_formats_that_can(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        write(tmp_path / "out", "transformers", model(global_pool="avg"))
    assert str(caught.value).startswith(
        "transformers cannot express this model; use --format safetensors or timm or onnx or mlflow:\n"
        "  - model.global_pool avg: its classifier reads the cls token"
    )
    with pytest.raises(ExportError, match="or bigvision or onnx"):
        write(tmp_path / "out", "transformers", model(global_pool="norm_avg"))


QUICK = [pytest.param(form, marks=[pytest.mark.slow] if form in SLOWLY else []) for form in EXPORTS]


@pytest.mark.parametrize("form", QUICK)
def test_folded_normalisation_takes_pixels_between_0_and_1(tmp_path: Path, form: str) -> None:
    config = model(**WIDE)
    done = write(tmp_path / "out", form, config, fold_normalization=True)
    assert done.difference is not None
    assert done.difference <= 2e-5
    said = json.loads((done.path / "config.json").read_text())["pretrain"]["input"]
    wanted = ([0.5] * 3, [0.5] * 3) if form == "bigvision" else ([0.0] * 3, [1.0] * 3)
    assert (said["mean"], said["std"]) == wanted
    card = (done.path / "README.md").read_text()
    assert "Trained with mean [0.1, 0.2, 0.3], std [0.4, 0.5, 0.6]; the difference is folded" in card


def test_folding_there_and_back_is_the_same_model() -> None:
    config = model(**WIDE)
    weights = random_weights(config)
    there = renormalised(weights, config, (0.7, 0.2, 0.4), (0.3, 0.9, 0.5))
    back, config_back = renormalised(*there, config.mean, config.std)
    assert config_back == config
    for name, value in weights.items():
        torch.testing.assert_close(back[name], value)
    with torch.no_grad():
        images = photographs(config)
        torch.testing.assert_close(
            build(there[1], there[0])(images), build(config, weights)(images), atol=1e-5, rtol=1e-5
        )


def test_transformers_own_pipeline_of_a_picture_gives_our_logits(tmp_path: Path) -> None:
    """AutoModel and AutoImageProcessor, from a picture to logits: epsilon, activation, mean, std and names are right."""
    config = model(norm_eps=1e-5, layer_scale=0.1)
    about = About({}, Preprocess(1.0, "bicubic"), ("ant", "bee", "cat", "dog", "elk"))
    done = write(tmp_path / "out", "transformers", config, about)
    net = AutoModelForImageClassification.from_pretrained(done.path, local_files_only=True).eval()
    processor = AutoImageProcessor.from_pretrained(done.path, local_files_only=True)
    assert net.config.layer_norm_eps == 1e-5
    assert net.config.id2label[2] == "cat"
    picture = photographs(config, 1)
    pixels = processor(images=[picture[0].permute(2, 0, 1)], return_tensors="pt")
    with torch.no_grad():
        expected = build(config, random_weights(config))(picture)
        torch.testing.assert_close(net(**pixels).logits, expected, atol=1e-5, rtol=1e-4)
    assert not list(done.path.glob("*.bin"))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_an_onnx_file_takes_any_number_of_images(onnx_folder: Path, count: int) -> None:
    config = model(global_pool="map", **WIDE)
    images = photographs(config, count)
    got = exporter("onnx").load(onnx_folder)(images)
    with torch.no_grad():
        torch.testing.assert_close(got, build(config, random_weights(config))(images), atol=1e-5, rtol=1e-4)


def test_an_onnx_file_says_what_it_takes_and_gives(onnx_folder: Path) -> None:
    document = onnx.load(onnx_folder / "model.onnx")
    onnx.checker.check_model(document)
    (entry,), (result,) = document.graph.input, document.graph.output
    assert (entry.name, result.name) == ("images", "logits")
    assert entry.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim] == ["batch", 8, 24, 3]
    assert {node.domain for node in document.graph.node} <= {"", "ai.onnx"}


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("onnx") / "out", "onnx", model(global_pool="map", **WIDE)).path


def test_a_big_vision_file_has_big_vision_s_names_and_shapes(tmp_path: Path) -> None:
    done = write(tmp_path / "out", "bigvision", model(global_pool="map", representation_size=24, **WIDE))
    with np.load(done.path / "model.npz") as archive:
        shapes = {name: archive[name].shape for name in archive.files}
    assert shapes["params/embedding/kernel"] == (4, 2, 3, 32)
    assert shapes["params/pos_embedding"] == (1, 24, 32)
    heads = "params/Transformer/encoderblock_1/MultiHeadDotProductAttention_0"
    assert shapes[f"{heads}/query/kernel"] == (32, 2, 16)
    assert shapes[f"{heads}/key/bias"] == (2, 16)
    assert shapes[f"{heads}/out/kernel"] == (2, 16, 32)
    assert shapes["params/MAPHead_0/probe"] == (1, 1, 32)
    assert shapes["params/pre_logits/kernel"] == (32, 24)
    assert shapes["params/head/kernel"] == (24, 5)
    assert "params/cls" not in shapes


def test_the_card_says_where_the_weights_come_from(tmp_path: Path) -> None:
    hand_off = {
        "run": "runs/b", "checkpoint": "runs/a/checkpoints/step_5", "step": 5, "sha256": "ab" * 32,
        "weights": [{"name": "pos_embed", "action": "resized", "detail": "4x4 -> 8x8 bicubic|x"}],
    }  # fmt: skip
    lineage = {
        "run": "runs/b",
        "train_digest": "cd" * 32,
        "metrics": {"val/top1": 0.81},
        "hand_offs": [hand_off],
    }
    about = About(lineage, licence="apache-2.0", recipe="optim:\n  lr: 0.001\n")
    done = write(tmp_path / "out", "safetensors", model(), about)
    card = (done.path / "README.md").read_text()
    for words in (
        'license: "apache-2.0"', "cd" * 32, "| val/top1 | 0.81 |", "## Hand-off into runs/b",
        "| pos_embed | resized | 4x4 -> 8x8 bicubic\\|x |", "lr: 0.001", "mean [0.1, 0.2, 0.3]",
    ):  # fmt: skip
        assert words in card
    done = write(tmp_path / "none", "safetensors", model(), ABOUT)
    assert "The licence is not stated" in (done.path / "README.md").read_text()


def test_a_secret_in_the_lineage_stays_out_of_the_card(tmp_path: Path) -> None:
    about = About({"trained_on": "https://user:hunter2@shards.example/a-{0..9}.tar"})
    done = write(tmp_path / "out", "safetensors", model(), about)
    assert "hunter2" not in (done.path / "README.md").read_text()


@pytest.mark.parametrize("form", QUICK[2:])
def test_what_answers_otherwise_is_not_kept(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that are written are not those that are judged."""
    adapt = exporter(form).adapt

    def spoil(weights: dict[str, torch.Tensor], config: Any) -> Any:
        adapted, said = adapt(weights, config)
        return {**adapted, "norm.bias": adapted["norm.bias"] + 0.01}, said

    monkeypatch.setattr(exporter(form), "adapt", spoil)
    with pytest.raises(ExportError, match="loaded again it answers otherwise"):
        write(tmp_path / "out", form, model())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", EXPORTS)
def test_a_full_disk_leaves_nothing(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter(form), "write", full)
    with pytest.raises(ExportError, match="No space left"):
        write(tmp_path / "out", form, model())
    assert list(tmp_path.iterdir()) == []


def test_an_mlflow_model_holds_no_pickle_and_loads_where_they_are_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    config = model()
    done = write(tmp_path / "out", "mlflow", config)
    names = {path.name for path in done.path.rglob("*")}
    assert "model.pt2" in names
    assert not any(name.endswith((".pkl", ".pth", ".bin")) for name in names)
    loaded = mlflow.pyfunc.load_model(str(done.path))
    got = torch.from_numpy(np.array(loaded.predict(photographs(config, 3).numpy())))
    with torch.no_grad():
        torch.testing.assert_close(got, build(config, random_weights(config))(photographs(config, 3)))
