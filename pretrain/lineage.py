"""Which code is running: facts to store beside a run's results."""

import subprocess
from importlib import metadata
from pathlib import Path


def code_facts() -> dict[str, str]:
    """`version` of the package, and where it runs from a clone `git_sha` and `git_dirty` ("true" or "false").

    Asks git about this very file, so that a package installed below somebody else's clone is not mistaken for it.
    """
    facts = {"version": metadata.version("pretrain")}
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return facts
    sha = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    if sha and changes is not None:
        facts |= {"git_sha": sha, "git_dirty": "true" if changes else "false"}
    return facts


def code_changes() -> str | None:
    """How the code of the clone differs from its commit, as git's diff of tracked files; None outside of a clone."""
    if "git_sha" not in code_facts():
        return None
    return _git("diff", "--no-ext-diff", "--no-textconv", "HEAD", "--", ":/")


def _git(*arguments: str) -> str | None:
    """What git answers about this package's folder; None where there is no git, no clone, or no answer in time."""
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
