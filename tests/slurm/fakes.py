"""The batch script without Slurm: run by bash, with programs on PATH that note what they are called with."""

import subprocess
from pathlib import Path

from patience import PATIENCE

RECORDS = "calls"


def fake(folder: Path, name: str, *lines: str) -> Path:
    """A program that appends its name and arguments, each ended by a NUL, to `folder/calls`, then does `lines`."""
    path = folder / name
    path.write_text(
        "#!/bin/bash\n"
        f"printf '%s\\0' {name} \"$@\" $'\\n' >> \"{folder}/{RECORDS}\"\n" + "\n".join(lines) + "\n"
    )
    path.chmod(0o755)
    return path


def run_script(script: Path, folder: Path, **variables: str) -> "subprocess.CompletedProcess[bytes]":
    """Run a rendered script as Slurm would, in `folder`, with the programs that were faked there."""
    env = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[0-1]",
        **variables,
    }
    return subprocess.run(["bash", str(script)], cwd=folder, env=env, capture_output=True, timeout=PATIENCE)


def calls(folder: Path) -> list[list[str]]:
    """What was called, in order: name and arguments."""
    path = folder / RECORDS
    if not path.exists():
        return []
    return [call.decode().split("\0") for call in path.read_bytes().split(b"\0\n\0") if call]
