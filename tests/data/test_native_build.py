"""The native part is built where it can be, and its absence costs nobody the install."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from patience import PATIENCE

ROOT = Path(__file__).parents[2]
MODULE = "pretrain/data/_jpegbox" + sysconfig.get_config_var("EXT_SUFFIX")
REPORT = (
    "from pretrain.data.decode import decoder; import pretrain; print(pretrain.__file__); print(decoder())"
)
NEEDED = [Path(sysconfig.get_paths()["include"], "Python.h"), Path("/usr/include/jpeglib.h")]
can_build = pytest.mark.skipif(
    shutil.which("gcc") is None or not all(header.is_file() for header in NEEDED),
    reason=f"needs gcc, {' and '.join(map(str, NEEDED))}",
)


@pytest.fixture
def clone(tmp_path) -> Path:
    """The files that git knows of, as they are now: nothing that was built before."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (
            name.startswith(("pretrain/", "launch/", "slurm/", "README", "pyproject"))
            and (ROOT / name).is_file()
        ):
            (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "clone" / name)
    return tmp_path / "clone"


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed() -> dict[Path, int]:
    """Files of this project in the environment of the tests, and when each was written."""
    found = Path(sysconfig.get_paths()["purelib"]).glob("*pretrain*")
    return {path: path.stat().st_mtime_ns for path in found}


def install(source: Path, *options: str | Path, cwd: Path, **env: str) -> None:
    """Beside the environment of the tests, never into it: without --ignore-installed pip removes what is installed there."""
    alone = ("--ignore-installed", "--no-deps", "--no-build-isolation")
    before = installed()
    run("-m", "pip", "install", "-q", *alone, *options, source, cwd=cwd, **env)
    assert installed() == before


def sdist(clone: Path) -> Path:
    run("-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=clone)
    [made] = (clone / "dist").glob("*.tar.gz")
    return made


@can_build
def test_an_editable_install_builds_it_in_place(clone, tmp_path):
    install(clone, "--prefix", tmp_path / "prefix", "--editable", cwd=tmp_path)
    assert (clone / MODULE).is_file()
    assert "only the box that a view shows" in run("-c", REPORT, cwd=tmp_path, PYTHONPATH=str(clone))


@can_build
def test_an_sdist_builds_it_elsewhere(clone, tmp_path):
    install(sdist(clone), "--target", tmp_path / "target", cwd=tmp_path)
    said = run("-c", REPORT, cwd=tmp_path, PYTHONPATH=str(tmp_path / "target"))
    assert said.startswith(str(tmp_path / "target"))
    assert "only the box that a view shows" in said


def test_without_a_compiler_the_install_goes_on_and_the_decoder_says_so(clone, tmp_path):
    install(sdist(clone), "--target", tmp_path / "target", cwd=tmp_path, CC="/bin/false")
    said = run("-c", REPORT, cwd=tmp_path, PYTHONPATH=str(tmp_path / "target"))
    assert said.startswith(str(tmp_path / "target"))
    assert "pictures are decoded whole" in said
    assert "apt-get install gcc libjpeg62-turbo-dev" in said
