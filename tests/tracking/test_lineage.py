import subprocess
from pathlib import Path

from pretrain import lineage


def test_the_commit_is_that_of_the_clone_that_runs():
    folder = Path(lineage.__file__).parent
    asked = subprocess.run(
        ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    facts = lineage.code_facts()
    assert facts["version"]
    assert facts.get("git_sha", "") == asked.stdout.strip()
    assert facts.get("git_dirty") in (("true", "false") if asked.stdout else (None,))


def test_a_package_installed_below_a_clone_of_something_else_has_no_commit(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", tmp_path, *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    installed = tmp_path / "site-packages" / "lineage.py"
    installed.parent.mkdir()
    installed.write_text("")
    monkeypatch.setattr(lineage, "__file__", str(installed))
    assert lineage.code_facts().keys() == {"version"}


def test_what_was_changed_since_the_commit_is_told_and_only_of_this_clone(tmp_path, monkeypatch):
    package = tmp_path / "clone" / "pretrain"
    package.mkdir(parents=True)
    installed = package / "lineage.py"
    installed.write_text("a = 1\n")

    def git(*words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", tmp_path / "clone", *identity, *words], check=True)

    monkeypatch.setattr(lineage, "__file__", str(installed))
    assert lineage.code_changes() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    assert lineage.code_changes() == ""
    installed.write_bytes(b"a = 2 # \xff\n")
    assert "-a = 1" in lineage.code_changes()
