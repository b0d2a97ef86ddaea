"""docs/vit-questions.md: what is written into it from the results, and what its sentences say of them.

`<!-- study NAME: begin -->` to its end is that study's table, `<!-- setting: begin -->` to its end how long the runs were.
A sentence that reads a result stands behind a comment `<!-- says STUDY MEASURE: FINDING -->`: where the results find
otherwise, it is named, and somebody writes it anew.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pretrain.config import load
from pretrain.errors import ConfigError
from pretrain.studies.questions import HANDOFF, POSITION, STUDIES
from pretrain.studies.report import RESULTS, findings, read, table

PAGE = Path("docs/vit-questions.md")
REMEDY = "run `python -m pretrain.studies --write`"

_SAYS = re.compile(r"<!-- says (\S+) (\S+): (.*?) -->", re.DOTALL)


def renew(page: Path, write: bool) -> None:
    """Bring the page's tables up to date, or raise `ConfigError` where they are not.

    Raises it too, after writing, where a sentence says what the results do not.
    """
    try:
        before = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {page}: {error.strerror}; run this in a clone") from None
    results = read(page.parent / "studies" / RESULTS)
    after = with_results(before, results)
    if write:
        page.write_text(after, encoding="utf-8")
    elif after != before:
        raise ConfigError(f"the tables in {page} are not those of its results: {REMEDY}")
    if wrong := list(untrue(after, results)):
        raise ConfigError(
            f"sentences in {page} do not say what its results do; write each anew, and the comment before it:\n"
            + "\n".join(f"  - {words}" for words in wrong)
        )


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def with_results(page: str, results: Mapping[str, Any]) -> str:
    """The page with what is written from results renewed; raises `ConfigError` where it has no place for it."""
    page = _put(page, "setting", setting(results))
    for name, scores in results["studies"].items():
        page = _put(page, f"study {name}", table(STUDIES[name], scores))
    return page


def setting(results: Mapping[str, Any]) -> str:
    """How long the runs were, and how many seeds they had."""
    pretrained = load(POSITION.config, results["overrides"])
    tuned = load(HANDOFF.config, results["handoff"])
    seeds = {len(of) for scores in results["studies"].values() for of in scores.values()}
    return (
        f"The setting is `{results['setting']}`: {pretrained.train.total_steps:,} steps of "
        f"{pretrained.train.global_batch} images at a learning rate of {pretrained.optim.lr:g}, "
        f"{tuned.train.total_steps:,} more at {tuned.optim.lr:g} after a hand-off, "
        f"{' or '.join(map(str, sorted(seeds)))} seeds."
    )


def untrue(page: str, results: Mapping[str, Any]) -> Iterator[str]:
    """What the page says that results do not, and results of which it says nothing."""
    said: dict[tuple[str, str], list[str]] = {}
    for study, measure, words in _SAYS.findall(page):
        said.setdefault((study, measure), []).append(" ".join(words.split()))
    for study, scores in results["studies"].items():
        for measure, found in findings(STUDIES[study], scores).items():
            for words in said.pop((study, measure), ["nothing"]):
                if words != found:
                    yield f"{study} {measure}: the page says {words!r}, the results {found!r}"
    for study, measure in said:
        yield f"{study} {measure}: there is no such result"


def _put(page: str, name: str, text: str) -> str:
    begin, end = markers(name)
    parts = re.split(f"{re.escape(begin)}.*?{re.escape(end)}", page, flags=re.DOTALL)
    if len(parts) != 2:
        raise ConfigError(f"the page has no place for the {name}: {begin} ... {end}")
    return f"{begin}\n{text}\n{end}".join(parts)
