"""Imports point down, heavy libraries have one door, and no code or data can smuggle a command in."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import PATIENCE

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for room in ("pretrain", "launch", "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))
]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the package below `folder` against the contracts of the pyproject.toml there."""
    return subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--no-logo"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_imports_point_down_and_heavy_libraries_have_one_door() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kept, 0 broken" in done.stdout


def test_every_kind_of_violation_is_caught(tmp_path: Path) -> None:
    for package in ("launch", "pretrain"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    violations = {
        "pretrain/model/vit.py": "import pretrain.data.order",  # siblings of one layer
        "pretrain/checkpoint/save.py": "def late() -> None:\n    import pretrain.trainer",  # upwards, inside a function
        "pretrain/metrics.py": "import deepspeed",
        "pretrain/trainer.py": "import mlflow",
        "pretrain/run_dir.py": "from webdataset import TarWriter",
        "pretrain/world.py": "import launch.queue",
        "launch/plain.py": "import launch.render",
        "pretrain/unplaced.py": "",  # a module without a layer
    }
    for name, line in violations.items():
        with (tmp_path / name).open("a") as file:
            file.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    assert "0 kept, 6 broken" in done.stdout
    for importer in (
        "pretrain.model.vit",
        "pretrain.checkpoint.save",
        "pretrain.metrics",
        "pretrain.trainer",
    ):
        assert f"- {importer} ->" in done.stdout, done.stdout
    assert "pretrain.run_dir -> webdataset" in done.stdout
    assert "unplaced" in done.stdout


PICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"} | {
    f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load", "unsafe_load_all")
}


def forbidden(source: str) -> Iterator[str]:
    """What must not stand in our code: pickles of any kind, Python or a shell made from text."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names) if PICKLES & {alias.name.partition(".")[0] for alias in names}:
                yield ast.unparse(node)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in PICKLES:
                yield ast.unparse(node)
            case ast.Call(func=func, keywords=keywords):
                name = ast.unparse(func)
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in keywords}
                if (
                    name in CALLS
                    or options.get("shell", "False") != "False"
                    or options.get("allow_pickle", "False") != "False"
                    or (name == "torch.load" and options.get("weights_only") != "True")
                ):
                    yield ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_is_loaded_and_no_text_is_executed(path: Path) -> None:
    assert list(forbidden(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(line, shell=True)",
        "subprocess.run(line, shell=choice)",
        "os.system('ls')",
        "eval(text)",
    ],
)
def test_each_forbidden_call_is_seen(source: str) -> None:
    assert list(forbidden(source)) == [source]


@pytest.mark.parametrize(
    "source", ["model.eval()", "torch.load(path, weights_only=True)", "yaml.safe_load(text)"]
)
def test_harmless_calls_are_not(source: str) -> None:
    assert list(forbidden(source)) == []
