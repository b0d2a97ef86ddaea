"""What is wrong or hostile in weights of strangers is named; nothing of it runs, and nothing is half imported."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peers import WIDE, model, random_weights, write
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from pretrain.errors import CheckpointError
from pretrain.formats.names import stored
from pretrain.formats.native import load_export
from pretrain.formats.npz import rules
from pretrain.importing import import_

SAID = ["--img-size", "8", "24", "--num-heads", "2", "--mean", "0.5", "--std", "0.5"]
MARK = "executed"
BOMB = 2**31
"""Bytes that a header claims."""


class Executes:
    """Unpickled, it leaves a file."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / MARK

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


def refused(source: Path, message: str, *arguments: str) -> None:
    """It is refused with the message, nothing ran, nothing was written."""
    out = source.parent / "out"
    with pytest.raises(CheckpointError, match=message):
        CliRunner().invoke(import_, [str(source), "--out", str(out), *arguments], catch_exceptions=False)
    assert not [path for path in source.parent.iterdir() if path.name.startswith((".out", "out", MARK))]


def state_dict() -> dict[str, torch.Tensor]:
    net = VisionTransformer(
        img_size=(8, 24), patch_size=(4, 2), embed_dim=32, depth=2, num_heads=2, num_classes=3
    )
    return {name: value.clone() for name, value in net.state_dict().items()}


def pickled_pth(path: Path) -> None:
    torch.save({**state_dict(), "x": Executes(path.parent)}, path)


def old_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Executes(path.parent)))


def old_torch_file(path: Path) -> None:
    torch.save({"x": Executes(path.parent)}, path, _use_new_zipfile_serialization=False)


def scripted(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)


def expanded(path: Path) -> None:
    torch.save({**state_dict(), "head.bias": torch.zeros(1).expand(2**40)}, path)


def sparse(path: Path) -> None:
    torch.save({**state_dict(), "head.bias": torch.sparse_coo_tensor([[0]], [1.0], (2**40,))}, path)


def deflated(path: Path) -> None:
    torch.save(state_dict(), path.with_suffix(".plain"))
    with zipfile.ZipFile(path.with_suffix(".plain")) as plain, zipfile.ZipFile(path, "w") as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name), compress_type=zipfile.ZIP_DEFLATED)


def cut_pth(path: Path) -> None:
    torch.save(state_dict(), path)
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pickled_pth, "holds more than tensors"),
        (old_pickle, "no file of torch.save since"),
        (old_torch_file, "no file of torch.save since"),
        (scripted, "is compressed|holds more than tensors"),
        (expanded, "head.bias claims more numbers than there are"),
        (sparse, "head.bias is no plain tensor|holds more than tensors"),
        (deflated, "is compressed, which torch.save never does"),
        (cut_pth, "holds more than tensors|no file of torch.save|not an archive"),
        (lambda path: torch.save([1, 2], path), "holds no state dict"),
        (lambda path: torch.save({**state_dict(), "reg_token": torch.ones(3)}, path), "is not a ViT's state dict"),
        (lambda path: path.write_bytes(b""), "no file of torch.save"),
    ],
    ids=["pickle", "bare pickle", "old file", "script", "expanded", "sparse", "deflated", "cut", "list", "flat registers", "empty"],
)  # fmt: skip
def test_a_pth_gives_tensors_or_nothing(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "w.pth")
    refused(tmp_path / "w.pth", message, *SAID)


def safetensors_of(header: bytes, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(**changes: Any) -> bytes:
    return json.dumps(
        {"head.bias": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} | changes}
    ).encode()


@pytest.mark.parametrize(
    "content",
    [
        safetensors_of(entry(), length=2**60),
        safetensors_of(entry(), length=2**31),
        safetensors_of(entry(data_offsets=[0, BOMB], shape=[BOMB // 4])),
        safetensors_of(entry(shape=[2**62, 8])),
        safetensors_of(entry(data_offsets=[64, 0])),
        safetensors_of(entry(shape=[-16])),
        safetensors_of(b"[" * 100_000),
        safetensors_of(b"{}" + b" " * 1000),
        b"\x80\x04" + pickle.dumps([1]),
        b"",
    ],
    ids=["length", "2 GB header", "past the end", "overflow", "backwards", "negative", "nested", "none", "pickle", "empty"],
)  # fmt: skip
def test_a_safetensors_file_is_what_it_says_or_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    refused(tmp_path / "w.safetensors", "is not a safetensors file|is not a ViT's state dict", *SAID)


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    config = model(pos_embed_order="pe_then_cls", mean=(0.5,), std=(0.5,), **WIDE)
    weights = stored(random_weights(config), config, rules(old=False))
    return {f"params/{name}": value.numpy() for name, value in weights.items()}


def with_member(path: Path, name: str, content: bytes, compress: int = zipfile.ZIP_STORED) -> None:
    """A sound file, one member of which is another."""
    sound = arrays()
    sound.pop(name)
    np.savez(path, **sound)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", content, compress_type=compress)


def npy(header: str, data: bytes = b"\0" * 12) -> bytes:
    text = header.encode() + b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def object_array(path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Executes(path.parent)], dtype=object), allow_pickle=True)
    with_member(path, "params/head/bias", buffer.getvalue())


HEAD = "params/head/bias"
NPZ: dict[str, tuple[Callable[[Path], object], str]] = {
    "objects": (object_array, "objects are pickles and not read"),
    "claims 2 GB": (
        lambda p: with_member(p, HEAD, npy("{'descr': '<f4', 'fortran_order': False, 'shape': (536870912,), }")),
        "its header claims",
    ),
    "claims 10^30": (
        lambda p: with_member(p, HEAD, npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**30},), }}")),
        "its header claims",
    ),
    "negative": (
        lambda p: with_member(p, HEAD, npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -3), }")),
        "its header claims",
    ),
    "code in a header": (
        lambda p: with_member(p, HEAD, npy("{'descr': __import__('os').mkdir('executed'), 'shape': ()}")),
        "cannot be read",
    ),
    "integers": (
        lambda p: with_member(p, HEAD, npy("{'descr': '<i4', 'fortran_order': False, 'shape': (3,), }")),
        "which is no weight",
    ),
    "a bomb": (
        lambda p: with_member(p, HEAD, b"\0" * 2**26, zipfile.ZIP_DEFLATED),
        r"would grow to [\d,]+ bytes",
    ),
    "no array": (lambda p: with_member(p, HEAD, b"hello"), "cannot be read"),
    "no archive": (lambda p: p.write_bytes(b"PK\x03\x04rest"), "not an archive"),
    "another architecture": (
        lambda p: np.savez(p, **{"params/conv_root/kernel": np.zeros((7, 7, 3, 64), np.float32)}),
        "no ViT of vision_transformer or big_vision",
    ),
    "a hybrid": (
        lambda p: np.savez(p, **{**arrays(), "params/conv_root/kernel": np.zeros((7, 7, 3, 64), np.float32)}),
        "not part of the model: conv_root/kernel",
    ),
    "a missing array": (
        lambda p: np.savez(p, **{k: v for k, v in arrays().items() if k != "params/Transformer/encoder_norm/bias"}),
        "missing: Transformer/encoder_norm/bias",
    ),
    "flat queries": (
        lambda p: np.savez(p, **{
            k: v.reshape(32, 32) if k.endswith("_1/MultiHeadDotProductAttention_0/key/kernel") else v
            for k, v in arrays().items()
        }),
        r"has shape \[32, 2, 16\]|not 3 axes|differ in shape",
    ),
    "a scalar": (
        lambda p: np.savez(p, **arrays() | {"params/head/bias": np.zeros((), np.float32)}),
        r"head/bias has shape \[\], not 1 axes",
    ),
    "a flat head": (
        lambda p: np.savez(p, **arrays() | {"params/head/kernel": np.zeros(3, np.float32)}),
        "it has no head/kernel of 2 axes",
    ),
    "a stack of no blocks": (
        lambda p: np.savez(p, **arrays() | {"params/Transformer/encoderblock/LayerNorm_0/scale": np.zeros((), np.float32)}),
        "the stacked blocks differ in number",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), NPZ.values(), ids=NPZ)
def test_an_npz_holds_weights_or_is_refused(
    tmp_path: Path, make: Callable[[Path], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "w.npz")
    refused(tmp_path / "w.npz", message, "--img-size", "8", "24")


def test_an_npz_of_another_grid_than_the_user_says_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **arrays())
    refused(tmp_path / "w.npz", r"pos_embed \[1, 24, 32\] instead of \[1, 16, 32\]", "--img-size", "16", "8")
    refused(tmp_path / "w.npz", "img_size height 9 is not a multiple", "--img-size", "9", "8")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound transformers folder."""
    folder = tmp_path_factory.mktemp("vit") / "vit"
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=51, num_labels=3,
        image_size=[8, 24], patch_size=[4, 2],
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    return folder


def copied(sound: Path, folder: Path) -> Path:
    target = folder / "source"
    target.mkdir()
    for path in sound.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def code_of_its_own(folder: Path) -> None:
    mark = folder.parent / MARK
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(mark)!r})\nclass Evil: pass\n")
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})


def index_to(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder.parent / "elsewhere.safetensors")
        document = {"weight_map": dict.fromkeys(tensors, name.format(folder=folder.parent))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document))

    return make


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Executes(folder.parent)}, folder / "pytorch_model.bin")


def weights_with(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return make


BIAS = "classifier.bias"
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "code of its own": (code_of_its_own, "asks for code of its own"),
    "out of the folder": (index_to("../elsewhere.safetensors"), "no .safetensors file beside it"),
    "absolute": (index_to("{folder}/elsewhere.safetensors"), "no .safetensors file beside it"),
    "index to a pickle": (index_to("pytorch_model.bin"), "no .safetensors file beside it"),
    "index to nothing": (index_to("model-9.safetensors"), "there is no such file"),
    "pickled weights": (pickled_weights, "pickled weights are not read"),
    "quantised": (lambda f: edit(f / "config.json", quantization_config={"quant_method": "x"}), "are quantised"),
    "another model": (lambda f: edit(f / "config.json", model_type="swin"), "model_type 'swin': vit is read"),
    "another class": (lambda f: edit(f / "config.json", architectures=["ViTForMaskedImageModeling"]), "architectures"),
    "another activation": (lambda f: edit(f / "config.json", hidden_act="quick_gelu"), "hidden_act 'quick_gelu'"),
    "too deep": (lambda f: edit(f / "config.json", num_hidden_layers=10**9), "says num_hidden_layers"),
    "too wide": (lambda f: edit(f / "config.json", hidden_size=2**40), "larger than any network"),
    "too large": (lambda f: edit(f / "config.json", image_size=2**40), "larger than any network"),
    "another width": (lambda f: edit(f / "config.json", hidden_size=64), "of another shape"),
    "another patch": (lambda f: edit(f / "config.json", patch_size=[4, 4]), "of another shape"),
    "another grid": (lambda f: edit(f / "config.json", image_size=[8, 8]), "of another shape: pos_embed"),
    "heads that do not divide": (lambda f: edit(f / "config.json", num_attention_heads=5), "not divisible"),
    "a word for a number": (lambda f: edit(f / "config.json", layer_norm_eps="1e-6"), "a model that cannot be"),
    "a config of another kind": (lambda f: (f / "config.json").write_text('{"model_type": []}'), "model_type"),
    "nested": (lambda f: (f / "config.json").write_text('{"model_type":' + "[" * 200_000), "cannot be read"),
    "a missing weight": (weights_with(lambda w: w.pop(BIAS)), f"missing: {BIAS}"),
    "an extra weight": (weights_with(lambda w: w.update(x=torch.ones(1))), "not part of the model: vit.x"),
    "a pooler beside a classifier": (
        weights_with(lambda w: w.update({"vit.pooler.dense.weight": torch.ones(32, 32), "vit.pooler.dense.bias": torch.ones(32)})),
        "not part of the model: vit.pooler.dense.bias, vit.pooler.dense.weight",
    ),
    "NaN": (weights_with(lambda w: w[BIAS].fill_(torch.nan)), "values that are not finite: head.bias"),
    "integers": (weights_with(lambda w: w.update({BIAS: torch.ones(3, dtype=torch.int64)})), "floating-point"),
    "a scalar": (weights_with(lambda w: w.update({BIAS: torch.tensor(1.0)})), r"has shape \[\], which no weight has"),
    "no input": (lambda f: (f / "preprocessor_config.json").unlink(), "give --mean and --std"),
    "std of words": (lambda f: edit(f / "preprocessor_config.json", image_std=["a"]), "not one number for each"),
    "std of zero": (lambda f: edit(f / "preprocessor_config.json", image_std=[0, 0, 0]), "must be above 0"),
    "pixels of 0 to 255": (lambda f: edit(f / "preprocessor_config.json", do_rescale=False), "does not bring pixels"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_transformers_folder_is_sound_or_refused(
    tmp_path: Path, sound: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = copied(sound, tmp_path)
    spoil(folder)
    refused(folder, message)


TIMM: dict[str, tuple[dict[str, Any], str]] = {
    "a checkpoint to load": ({"model_args": {"checkpoint_path": "/tmp/x.pth"}}, "not taken from a file"),
    "a layer by name": ({"model_args": {"norm_layer": "os.system"}}, "not taken from a file"),
    "a word for a number": ({"model_args": {"depth": "2"}}, "not taken from a file"),
    "a hub": ({"architecture": "hf-hub:evil/model"}, "has no model|cannot build"),
    "a folder": ({"architecture": "local-dir:/tmp"}, "has no model|cannot build"),
    "an unknown name": ({"architecture": "vit_nonesuch"}, "has no model"),
    "another family": ({"architecture": "resnet18"}, "cannot build|cannot express"),
    "no name": ({"architecture": 7}, "does not describe a model"),
    "too deep": ({"model_args": {"depth": 10**6}}, "says depth 1000000"),
    "too wide": ({"model_args": {"embed_dim": 2**40}}, "larger than any network"),
    "not square": ({"model_args": {"img_size": [32, 31]}}, "cannot build|another shape|multiple"),
    "an unknown activation": (
        {"model_args": {"act_layer": "nonesuch"}},
        r"cannot build .*: KeyError\('nonesuch'\)",
    ),
    "no size": ({"model_args": {"img_size": []}}, "cannot build"),
    "a mean beyond all numbers": (
        {
            "model_args": {
                "depth": 2,
                "embed_dim": 32,
                "num_heads": 2,
                "img_size": [8, 24],
                "patch_size": [4, 2],
            },
            "pretrained_cfg": {"mean": [10**400] * 3},
        },
        "not one number for each",
    ),
    "arguments in a list": ({"model_args": [1]}, "is no JSON object"),
}


@pytest.mark.parametrize(("changes", "message"), TIMM.values(), ids=TIMM)
def test_a_timm_folder_is_sound_or_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (folder := tmp_path / "source").mkdir()
    save_file(state_dict(), folder / "model.safetensors")
    document = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": {"depth": 2}}
    (folder / "config.json").write_text(json.dumps(document | changes))
    refused(folder, message)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", "is no file", *SAID)


def test_what_is_nothing_known_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "of no format that is known.*--format")
    refused(tmp_path / "nothing", "there is no such file or folder")


def test_what_the_library_itself_does_not_load_is_not_imported(
    tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.formats import transformers_vit

    def broken(*_: object) -> None:
        raise RuntimeError("size mismatch for x\nmore")

    monkeypatch.setattr(transformers_vit, "judge", broken)
    refused(copied(sound, tmp_path), "the library does not load .*: size mismatch for x$")


def test_an_export_that_claims_a_million_blocks_is_answered_at_once(tmp_path: Path) -> None:
    done = write(tmp_path / "out", "safetensors", model())
    document = json.loads((done.path / "config.json").read_text())
    document["pretrain"]["model"]["depth"] = 10**6
    (done.path / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="too few weights"):
        load_export(done.path)
