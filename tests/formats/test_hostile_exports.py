"""An export that a stranger wrote, or changed, with hashes that fit: `pretrain predict` runs nothing of it and names it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from peers import SQUARE, model, photographs, write
from PIL import Image

from pretrain.errors import CheckpointError
from pretrain.formats.files import hashes
from pretrain.predict import predict

CONFIG = model(act="gelu", **SQUARE)
MARK = "executed"


class Executes:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (self.mark,)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound export of each format that predict opens, and a photograph."""
    folder = tmp_path_factory.mktemp("exports")
    for form in ("safetensors", "timm", "transformers", "onnx"):
        write(folder / form, form, CONFIG, verify=False)
    write(folder / "bigvision", "bigvision", model(act="gelu_tanh", **SQUARE), verify=False)
    Image.fromarray(photographs(CONFIG, 1)[0].numpy()).save(folder / "photo.png")
    return folder


def ask(export: Path, photo: Path) -> Result:
    return CliRunner().invoke(predict, [str(export), str(photo)], catch_exceptions=True)


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def ours(folder: Path, **changes: Any) -> None:
    edited(folder, pretrain=json.loads((folder / "config.json").read_text())["pretrain"] | changes)


def signed(folder: Path) -> None:
    """Whoever writes a payload writes its hashes too."""
    ours(folder, files={n: list(facts) for n, facts in hashes(folder).items() if n != "config.json"})


def in_model(**changes: Any) -> Callable[[Path], None]:
    return lambda f: ours(f, model=json.loads((f / "config.json").read_text())["pretrain"]["model"] | changes)


def arguments(**changes: Any) -> Callable[[Path], None]:
    return lambda f: edited(f, model_args=json.loads((f / "config.json").read_text())["model_args"] | changes)


def pickle_beside(name: str) -> Callable[[Path], None]:
    """The library looks for other names where the safe one is not there."""

    def make(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save({"x": Executes(folder / MARK)}, folder / name)
        signed(folder)

    return make


def pipe(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)
        if name != "config.json":
            ours(folder, files={name: [0, "0" * 64]})

    return make


def other_onnx(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        document = onnx.load(folder / "model.onnx")
        change(document)
        (folder / "model.onnx").write_bytes(document.SerializeToString())
        signed(folder)

    return make


def outside(document: onnx.ModelProto) -> None:
    """A weight that is said to lie in another file, above the folder."""
    weight = next(w for w in document.graph.initializer if w.data_type == onnx.TensorProto.FLOAT)
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../photo.png"), ("offset", "0"), ("length", "64")):
        weight.external_data.add(key=key, value=value)


def wider(document: onnx.ModelProto) -> None:
    document.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 99


CASES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "timm: a layer by name": ("timm", arguments(norm_layer="os.system"), "not taken from a file"),
    "timm: a checkpoint to load": ("timm", arguments(checkpoint_path="/tmp/x.pth"), "not taken from a file"),
    "timm: not strict": ("timm", arguments(pretrained_strict=False), "not taken from a file"),
    "timm: exabytes": ("timm", arguments(embed_dim=2**40), "larger than any network"),
    "timm: too deep": ("timm", arguments(depth=10**6), "says depth 1000000"),
    "timm: another family": ("timm", lambda f: edited(f, architecture="resnet18"), "cannot build|cannot express"),
    "timm: two sizes": ("timm", in_model(img_size=[32, 32]), "says two things of the model: img_size"),
    "timm: a pickle": ("timm", pickle_beside("pytorch_model.bin"), "does not name its weights"),
    "transformers: code": ("transformers", lambda f: edited(f, auto_map={"AutoModel": "evil.Evil"}), "code of its own"),
    "transformers: quantised": ("transformers", lambda f: edited(f, quantization_config={"quant_method": "bitsandbytes"}), "are quantised"),
    "transformers: too deep": ("transformers", lambda f: edited(f, num_hidden_layers=10**6), "says num_hidden_layers"),
    "transformers: a pickle": ("transformers", pickle_beside("pytorch_model.bin"), "does not name its weights"),
    "transformers: two heads": ("transformers", in_model(num_classes=9), "not one name for each class|num_classes"),
    "bigvision: a pipe": ("bigvision", pipe("model.npz"), "damaged or was replaced"),
    "onnx: no graph": ("onnx", lambda f: ((f / "model.onnx").write_bytes(b"\x80\x04K"), signed(f)), "cannot be loaded"),
    "onnx: another input": ("onnx", other_onnx(wider), "cannot be (loaded|run)"),
    "onnx: a file outside": ("onnx", other_onnx(outside), "cannot be (loaded|run)"),
    "ours: a pipe for config": ("safetensors", pipe("config.json"), "it is no file"),
    "ours: too deep": ("safetensors", in_model(depth=10**6), "too few weights"),
    "ours: an image of terabytes": ("safetensors", in_model(img_size=[2**20, 2**20]), "which is too large"),
    "ours: a name too few": ("safetensors", lambda f: ours(f, class_names=["a"]), "not one name for each class"),
    "ours: names in a word": ("safetensors", lambda f: ours(f, class_names="abcde"), "not one name for each class"),
    "ours: lists for objects": ("safetensors", lambda f: ours(f, lineage=[1]), "is no JSON object"),
    "ours: no input": ("safetensors", lambda f: ours(f, input={}), "input.crop is None"),
    "ours: a key more": ("safetensors", lambda f: ours(f, __reduce__=["os.system"]), "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_export_with_right_hashes_is_not_believed_for_them(
    tmp_path: Path, exports: Path, case: str
) -> None:
    form, harm, message = CASES[case]
    folder = shutil.copytree(exports / form, tmp_path / "export")
    shutil.copy(exports / "photo.png", tmp_path / "photo.png")
    harm(folder)
    done = ask(folder, tmp_path / "photo.png")
    assert isinstance(done.exception, CheckpointError), (done.output, done.exception)
    with pytest.raises(CheckpointError, match=message):
        raise done.exception
    assert done.stdout == ""
    assert not (folder / MARK).exists()


def test_what_transformers_would_fetch_or_load_besides_is_not_looked_at(
    tmp_path: Path, exports: Path
) -> None:
    """A kernel of the hub that config.json names, an adapter's base: its own loader follows both."""
    folder = shutil.copytree(exports / "transformers", tmp_path / "export")
    edited(folder, _attn_implementation="kernels-community/evil", attn_implementation="evil/kernel")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "evil/base"})
    )
    expected = ask(exports / "transformers", exports / "photo.png")
    got = ask(folder, exports / "photo.png")
    assert got.exception is None, got.exception
    assert got.stdout == expected.stdout


def test_names_cannot_speak_to_the_terminal(tmp_path: Path, exports: Path) -> None:
    """Of classes and of files; a file's may be no text at all, which printing would trip over when all is done."""
    folder = shutil.copytree(exports / "safetensors", tmp_path / "export")
    ours(folder, class_names=["\x1b[2Jevil", "b", "c", "d", "e"])
    photo = os.fsencode(tmp_path) + b"/\xff\x1b]0;evil.png"
    shutil.copyfile(exports / "photo.png", photo)
    done = CliRunner().invoke(
        predict, [str(folder), str(tmp_path), os.fsdecode(photo) + "x"], catch_exceptions=True
    )
    assert "\x1b" not in done.stdout + done.stderr
    assert "\N{REPLACEMENT CHARACTER}[2Jevil" in done.stdout
    assert "1 of 2 images could not be read" in str(done.exception)
