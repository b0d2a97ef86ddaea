"""Weights of other libraries come in as they are meant, judged by the library itself; and go out again."""

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import timm
import torch
from click import BadParameter
from click.testing import CliRunner, Result
from peers import SQUARE, WIDE, model, photographs, random_weights, randomise, write
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from pretrain.config import InitConfig
from pretrain.errors import CheckpointError
from pretrain.formats import transformers_vit
from pretrain.formats.files import About, Preprocess, read_provenance
from pretrain.formats.names import stored
from pretrain.formats.native import load_export
from pretrain.formats.npz import rules
from pretrain.importing import import_
from pretrain.transfer import transfer

NUMBERS = ["--mean", "0.5", "--std", "0.5"]


def bring(source: Path, out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(import_, [str(source), "--out", str(out), *arguments], catch_exceptions=False)


def difference(done: Result) -> float:
    assert done.exit_code == 0, done.output
    line = next(line for line in done.output.splitlines() if line.startswith("against "))
    assert line.endswith("on 8 images")
    print(line)
    return float(line.partition("differ by ")[2].split()[0])


TIMM = {
    "vit_small_patch16_224": ("token", 0, {"img_size": (48, 48)}),
    "deit3_small_patch16_224": ("token", 0, {"img_size": (32, 64)}),
    "vit_base_patch16_siglip_224": ("map", 0, {"img_size": (32, 32)}),
    "vit_small_patch14_reg4_dinov2": ("token", 4, {"img_size": (28, 42)}),
    "vit_medium_patch16_gap_240": ("norm_avg", 0, {"img_size": (48, 32)}),
    "vit_betwixt_patch16_reg4_gap_256": ("avg", 4, {"img_size": (32, 32)}),
    "vit_so150m_patch16_reg4_map_256": ("map", 4, {"img_size": (32, 64)}),
    "vit_giant_patch14_reg4_dinov2": ("token", 4, {"img_size": (28, 28), "embed_dim": 32, "num_heads": 2}),
}
SHORT = {"depth": 2, "num_classes": 3}


def timm_folder(folder: Path, name: str, **arguments: Any) -> torch.nn.Module:
    """As timm's own save_for_hf lays it out."""
    net = randomise(timm.create_model(name, pretrained=False, **arguments))
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    config = {key: net.pretrained_cfg[key] for key in ("mean", "std", "crop_pct", "interpolation")}
    document = {
        "architecture": name,
        "num_classes": net.num_classes,
        "model_args": arguments,
        "pretrained_cfg": config,
        "label_names": [f"kind {n}" for n in range(net.num_classes)],
    }
    (folder / "config.json").write_text(json.dumps(document))
    return net


@pytest.mark.parametrize("name", TIMM)
def test_timm_s_registered_models_come_in_from_a_folder(tmp_path: Path, name: str) -> None:
    pool, registers, shape = TIMM[name]
    net = timm_folder(tmp_path / "source", name, **SHORT | shape)
    done = bring(tmp_path / "source", tmp_path / "out")
    assert difference(done) <= 1e-5
    _, config = load_export(tmp_path / "out")
    assert (config.global_pool, config.num_registers, config.num_blocks) == (pool, registers, 2)
    assert config.img_size == tuple(net.patch_embed.img_size)
    found = read_provenance(tmp_path / "out")
    assert found.class_names == ("kind 0", "kind 1", "kind 2")
    assert list(found.input["mean"]) == list(net.pretrained_cfg["mean"])
    assert found.preprocess.crop == net.pretrained_cfg["crop_pct"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_state_dict_comes_in_by_the_name_of_timm_s_model(tmp_path: Path, suffix: str) -> None:
    net = randomise(timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=(32, 48)))
    source = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": net.state_dict(), "epoch": 3}, source)
        with pytest.raises(CheckpointError, match=r"epoch|no state dict|vit"):
            bring(source, tmp_path / "no", "--timm-model", "vit_nonesuch_patch16_224", *NUMBERS)
    else:
        save_file(net.state_dict(), source)
    done = bring(source, tmp_path / "out", "--timm-model", "vit_tiny_patch16_224", "--img-size", "32", "48")
    assert difference(done) <= 1e-5
    assert load_export(tmp_path / "out")[1].grid == (2, 3)
    assert read_provenance(tmp_path / "out").preprocess == (0.9, "bicubic")


@pytest.mark.parametrize(
    "changes",
    [{}, {"global_pool": "avg"}, {"global_pool": "map"}, {"qkv_bias": False, "reg_tokens": 2},
     {"global_pool": "avg", "class_token": True, "reg_tokens": 1, "init_values": 0.1, "qk_norm": True}],
    ids=["cls", "mean with cls", "map with cls", "no bias", "mean, cls, register"],
)  # fmt: skip
def test_a_bare_state_dict_comes_in_by_its_shapes_and_two_words(tmp_path: Path, changes: Any) -> None:
    from timm.models.vision_transformer import VisionTransformer

    settings = {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "mlp_ratio": 3.1,
        "num_classes": 5,
        "act_layer": "relu",
    }
    net = randomise(VisionTransformer(img_size=(8, 24), patch_size=(4, 2), **settings | changes))
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    said = ["--img-size", "8", "24", "--num-heads", "4", "--act", "relu", *NUMBERS]
    done = bring(tmp_path / "w.safetensors", tmp_path / "out", *said)
    assert difference(done) <= 1e-5
    pool = changes.get("global_pool", "token")
    taken = f"note: taken, since shapes do not say it: act relu, norm_eps 1e-06, global_pool {pool}"
    assert taken in done.output.splitlines()
    _, config = load_export(tmp_path / "out")
    assert config.num_registers == changes.get("reg_tokens", 0) + (pool != "token")
    with pytest.raises(CheckpointError, match="--timm-model, or give --img-size"):
        bring(tmp_path / "w.safetensors", tmp_path / "no", *NUMBERS)


@pytest.mark.parametrize(
    ("below", "wrapped"),
    [("state_dict_ema", "module."), ("state_dict", "_orig_mod.module."), ("model", "module._orig_mod."), (None, "module.")],
)  # fmt: skip
def test_a_training_s_file_gives_the_state_dict_that_timm_would_load(
    tmp_path: Path, below: str | None, wrapped: str
) -> None:
    """timm's own `load_checkpoint` is asked: averaged weights before the others, names without what wrapped the model."""
    from timm.models import load_checkpoint

    source = tmp_path / "w.pth"
    net = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=3)
    document: dict[str, Any] = {"epoch": 3}
    for scale, key in enumerate(("model", "state_dict", "state_dict_ema"), start=1):
        document[key] = {f"{wrapped}{name}": scale * value for name, value in net.state_dict().items()}
        if key == below:
            break
    torch.save(document if below else document["model"], source)
    said = ["--img-size", "32", "32", "--num-heads", "3", *NUMBERS]
    done = bring(source, tmp_path / "out", *said)
    difference(done)
    assert (f"note: its weights are those below {below}" in done.output) == (below is not None)
    load_checkpoint(net, str(source))
    brought = load_export(tmp_path / "out")[0].state_dict()
    for name, value in net.state_dict().items():
        assert torch.equal(brought[name], value), name


def test_a_grey_model_comes_in_by_the_name_of_timm_s_model_of_colours(tmp_path: Path) -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=1, num_classes=3)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    said = ["--timm-model", "vit_tiny_patch16_224", "--img-size", "32", "32"]
    with pytest.raises(CheckpointError, match=r"--mean, or the source's mean, is .* not one number for each"):
        bring(tmp_path / "w.safetensors", tmp_path / "out", *said)
    bring(tmp_path / "w.safetensors", tmp_path / "out", *said, *NUMBERS, "--no-verify")
    assert load_export(tmp_path / "out")[1].in_chans == 1


def test_a_file_without_a_state_dict_says_what_there_is(tmp_path: Path) -> None:
    torch.save({"teacher": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"below state_dict_ema, .*; there is 'teacher', 'epoch': save the one"
    ):
        bring(tmp_path / "w.pth", tmp_path / "out", *NUMBERS)


def test_a_flat_config_of_an_early_timm_says_how_its_input_is_normalised(tmp_path: Path) -> None:
    timm_folder(tmp_path / "source", "vit_tiny_patch16_224", num_classes=3)
    document = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "mean": [0.1, 0.2, 0.3],
        "crop_pct": 0.75,
    }
    (tmp_path / "source" / "config.json").write_text(json.dumps(document))
    bring(tmp_path / "source", tmp_path / "out", "--no-verify")
    found = read_provenance(tmp_path / "out")
    assert (found.input["mean"], found.preprocess.crop) == ([0.1, 0.2, 0.3], 0.75)


def test_attention_pooling_with_a_norm_behind_it_is_refused(tmp_path: Path) -> None:
    net = timm.create_model("vit_tiny_patch16_224", depth=1, global_pool="map", fc_norm=True)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    said = ["--img-size", "224", "224", "--num-heads", "3", *NUMBERS]
    with pytest.raises(CheckpointError, match="fc_norm behind attention pooling"):
        bring(tmp_path / "w.safetensors", tmp_path / "out", *said, "--no-verify")


def test_a_model_of_timm_s_without_a_head_gets_one_of_zeros(tmp_path: Path) -> None:
    timm_folder(tmp_path / "source", "vit_base_patch16_siglip_224", depth=2, num_classes=0, img_size=[32, 32])
    done = bring(tmp_path / "source", tmp_path / "out")
    assert difference(done) <= 1e-5
    assert "features differ" in done.output
    assert "note: it has no head" in done.output
    assert not load_export(tmp_path / "out")[0].head.weight.any()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("vit_base_patch16_clip_224", "norm_pre"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled"),
        ("eva02_tiny_patch14_224", "Eva"),
        ("vit_base_patch16_rope_224", "Eva"),
        ("vit_tiny_r_s16_p8_224", "HybridEmbed"),
    ],
)
def test_models_of_timm_s_that_ours_cannot_express_are_refused_with_the_reason(
    tmp_path: Path, name: str, why: str
) -> None:
    net = timm.create_model(name, pretrained=False, depth=1)
    save_file(
        {k: v for k, v in net.state_dict().items() if v.is_floating_point()}, tmp_path / "w.safetensors"
    )
    with pytest.raises(CheckpointError, match=why):
        bring(tmp_path / "w.safetensors", tmp_path / "out", "--timm-model", name, *NUMBERS)
    assert not (tmp_path / "out").exists()


VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 51,
    "num_labels": 3,
}
HF = {
    "its defaults": {"image_size": 16, "patch_size": 4},
    "wide": {"image_size": [8, 24], "patch_size": [4, 2], "layer_norm_eps": 1e-6},
    "tanh GELU": {"image_size": 16, "patch_size": 4, "hidden_act": "gelu_new"},
    "no bias, grey": {
        "image_size": 16,
        "patch_size": 4,
        "qkv_bias": False,
        "num_channels": 1,
        "hidden_act": "relu",
    },
}


def hf_folder(folder: Path, kind: Any = ViTForImageClassification, **changes: Any) -> torch.nn.Module:
    net = randomise(kind(ViTConfig(**VIT | changes)))
    net.save_pretrained(folder)
    channels = net.config.num_channels
    ViTImageProcessor(image_mean=[0.4] * channels, image_std=[0.3] * channels).save_pretrained(folder)
    return net


@pytest.mark.parametrize("changes", HF.values(), ids=HF)
def test_transformers_folders_come_in(tmp_path: Path, changes: dict[str, Any]) -> None:
    hf_folder(tmp_path / "source", **changes)
    assert difference(bring(tmp_path / "source", tmp_path / "out")) <= 1e-5
    _, config = load_export(tmp_path / "out")
    assert config.norm_eps == changes.get("layer_norm_eps", 1e-12)
    assert config.act == {"gelu_new": "gelu_tanh", "relu": "relu"}.get(changes.get("hidden_act", ""), "gelu")
    assert set(config.mean) == {0.4}


@pytest.mark.parametrize("pooled", [True, False])
def test_a_vit_model_comes_in_with_its_pooler_as_the_tanh_layer(tmp_path: Path, pooled: bool) -> None:
    net = randomise(ViTModel(ViTConfig(**VIT | HF["wide"]), add_pooling_layer=pooled))
    net.save_pretrained(tmp_path / "source")
    done = bring(tmp_path / "source", tmp_path / "out", *NUMBERS)
    assert difference(done) <= 1e-5
    assert load_export(tmp_path / "out")[1].representation_size == (32 if pooled else None)


def test_weights_in_several_files_come_in(tmp_path: Path) -> None:
    net = randomise(ViTForImageClassification(ViTConfig(**VIT | HF["wide"])))
    net.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("model-*.safetensors"))) > 1
    assert difference(bring(tmp_path / "source", tmp_path / "out", *NUMBERS)) <= 1e-5


def npz(path: Path, settings: dict[str, Any], layout: str, dtype: Any = np.float32, **more: Any) -> None:
    """A file as the paper's code or big_vision lays it out."""
    old = layout.startswith("old")
    order = "cls_then_pe" if old else "pe_then_cls"
    config = model(pos_embed_order=order, mean=(0.5,), std=(0.5,), **settings)
    arrays = {n: v.numpy() for n, v in stored(random_weights(config), config, rules(old)).items()}
    if layout == "scan":
        blocks = [name for name in arrays if "encoderblock_0/" in name]
        for name in blocks:
            parts = [arrays.pop(name.replace("_0/", f"_{i}/", 1)) for i in range(config.num_blocks)]
            arrays[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(parts)
    prefix = {
        "old": "",
        "old, optimizer": "opt/target/",
        "new": "params/",
        "scan": "params/",
        "two towers": "params/img/",
    }
    np.savez(path, **{prefix[layout] + name: value.astype(dtype) for name, value in arrays.items()}, **more)


NPZ = [
    ("old", SQUARE), ("old", {**WIDE, "representation_size": 24}), ("old, optimizer", WIDE), ("new", WIDE),
    ("new", {**SQUARE, "global_pool": "norm_avg"}), ("new", {**WIDE, "global_pool": "map", "representation_size": 24}),
    ("scan", {**WIDE, "global_pool": "map"}), ("two towers", {**SQUARE, "global_pool": "map"}),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "settings"), NPZ)
def test_npz_files_of_every_layout_come_in(tmp_path: Path, layout: str, settings: dict[str, Any]) -> None:
    npz(tmp_path / "w.npz", settings, layout, **{"opt/state/step": np.zeros(1), "params/t": np.ones(1)} if "o" in layout[1:] else {})  # fmt: skip
    size = [str(n) for n in settings["img_size"]]
    done = bring(tmp_path / "w.npz", tmp_path / "out", "--img-size", *size)
    assert difference(done) <= 1e-5
    _, config = load_export(tmp_path / "out")
    assert (config.act, config.norm_eps, set(config.mean)) == ("gelu_tanh", 1e-6, {0.5})
    assert config.heads == 2
    assert config.representation_size == settings.get("representation_size")
    with pytest.raises(CheckpointError, match="does not say its image size"):
        bring(tmp_path / "w.npz", tmp_path / "no")


def test_bfloat16_that_numpy_does_not_know_comes_in(tmp_path: Path) -> None:
    npz(tmp_path / "w.npz", WIDE, "new", ml_dtypes.bfloat16)
    with np.load(tmp_path / "w.npz") as archive:
        assert archive["params/embedding/kernel"].dtype.kind == "V"
    assert difference(bring(tmp_path / "w.npz", tmp_path / "out", "--img-size", "8", "24")) <= 1e-5


ROUNDS = [
    ("timm", {"global_pool": "token", "num_registers": 2, "layer_scale": 0.1}, ()),
    ("timm", {"global_pool": "avg", "act": "swiglu", "mlp_dim": 50}, ()),
    ("timm", {"global_pool": "norm_avg"}, ()),
    ("timm", {"global_pool": "map", "pos_embed_order": "pe_then_cls"}, ()),
    ("transformers", {"norm_eps": 1e-5, "act": "gelu"}, ()),
    ("bigvision", {"pos_embed_order": "pe_then_cls"}, ("--img-size", "8", "24")),
    ("bigvision", {"global_pool": "norm_avg", "representation_size": 24}, ("--img-size", "8", "24")),
    ("bigvision", {"global_pool": "map"}, ("--img-size", "8", "24")),
]


@pytest.mark.parametrize(("form", "settings", "arguments"), ROUNDS)
def test_what_is_exported_comes_back_as_the_same_weights(
    tmp_path: Path, form: str, settings: dict[str, Any], arguments: tuple[str, ...]
) -> None:
    config = model(mean=(0.5,), std=(0.5,), **WIDE | settings)
    source = write(tmp_path / "sent", form, config).path
    done = bring(source / "model.npz" if form == "bigvision" else source, tmp_path / "out", *arguments)
    assert difference(done) <= 1e-5
    back, _ = load_export(tmp_path / "out")
    for name, value in random_weights(config).items():
        assert torch.equal(back.get_parameter(name), value), name


def test_how_images_are_cropped_goes_out_and_comes_back(tmp_path: Path) -> None:
    about = About({}, Preprocess(0.8, "bicubic"), ("a", "b", "c", "d", "e"))
    for form in ("timm", "transformers"):
        source = write(tmp_path / form, form, model(act="gelu"), about).path
        bring(source, tmp_path / f"{form} back")
        back = read_provenance(tmp_path / f"{form} back")
        assert (back.preprocess, back.class_names) == ((0.8, "bicubic"), about.class_names)


def test_an_import_is_a_start_at_another_size_and_head(tmp_path: Path) -> None:
    hf_folder(tmp_path / "source", **HF["wide"])
    bring(tmp_path / "source", tmp_path / "out")
    net, config = load_export(tmp_path / "out")
    target = config.model_copy(update={"img_size": (16, 16), "num_classes": 7})
    made = transfer(dict(net.named_parameters()), config, target, InitConfig(source="out"), seed=0)
    assert made.weights["pos_embed"].shape == (1, 1 + 32, 32)
    assert torch.equal(made.weights["blocks.1.attn.qkv.weight"], net.blocks[1].attn.qkv.weight)


def test_a_flag_that_would_mean_nothing_is_refused(tmp_path: Path) -> None:
    hf_folder(tmp_path / "source", **HF["wide"])
    with pytest.raises(CheckpointError, match="--act, --img-size: a source of format transformers says that"):
        bring(tmp_path / "source", tmp_path / "out", "--act", "relu", "--img-size", "8", "24")


def test_the_lineage_of_an_import_has_the_hash_of_every_file(tmp_path: Path) -> None:
    hf_folder(tmp_path / "source", **HF["wide"])
    bring(tmp_path / "source", tmp_path / "out", "--licence", "apache-2.0")
    found = read_provenance(tmp_path / "out")
    assert found.lineage["sha256"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "source").iterdir()
    }
    assert "config.json" in found.lineage["sha256"]
    assert found.licence == "apache-2.0"
    assert found.lineage["imported_from"] == "source"
    weights = load_file(tmp_path / "source" / "model.safetensors")
    assert torch.equal(load_export(tmp_path / "out")[0].head.weight, weights["classifier.weight"])


def test_a_number_that_means_nothing_and_the_source_as_its_own_target_are_refused(tmp_path: Path) -> None:
    hf_folder(tmp_path / "source", **HF["wide"])
    with pytest.raises(BadParameter, match=r"0\.0 is not in the range x>0"):
        CliRunner().invoke(
            import_,
            ["x", "--out", "y", "--norm-eps", "0"],
            catch_exceptions=False,
            standalone_mode=False,
        )
    with pytest.raises(CheckpointError, match="is the source itself"):
        bring(tmp_path / "source", tmp_path / "source" / ".." / "source")
    bring(tmp_path / "source", tmp_path / "ours", "--no-verify")
    with pytest.raises(CheckpointError, match="is an export of ours, of format safetensors"):
        bring(tmp_path / "ours", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"cannot be: mean\.0: Input should be a finite number$"):
        bring(tmp_path / "source", tmp_path / "out", "--mean", "nan", "--std", "1", "--no-verify")


@pytest.mark.parametrize(
    ("said", "crop", "stretches"),
    [
        ({"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}, 0.8, False),
        ({"size": {"height": 20, "width": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}, 0.8, True),
        ({"size": 20, "crop_size": 16, "do_center_crop": True}, 0.8, True),
        ({"size": {"height": 16, "width": 16}, "do_center_crop": False}, 1.0, True),
        ({"size": 16}, 1.0, True),
        ({"do_resize": False}, 1.0, False),
    ],
)  # fmt: skip
def test_every_way_that_a_processor_says_its_crop_is_read_and_stretching_is_said(
    tmp_path: Path, said: dict[str, Any], crop: float, stretches: bool
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    preprocess, stretched = transformers_vit._preprocess(tmp_path)
    assert (preprocess.crop, stretched) == (crop, stretches)
    notes = list(transformers_vit._notes(True, stretched))
    assert any("stretches" in note for note in notes) == stretches


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_base_patch16_siglip_224"])  # fmt: skip
def test_published_sizes_come_in(tmp_path: Path, name: str) -> None:
    from pretrain.formats import timm_source

    net = timm.create_model(name, pretrained=False).eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    assert difference(bring(tmp_path / "w.safetensors", tmp_path / "out", "--timm-model", name)) <= 1e-5
    assert timm_source.recognises(tmp_path / "w.safetensors")
    config = load_export(tmp_path / "out")[1]
    assert photographs(config).shape[1:3] == (224, 224)
