"""Results as data in docs/studies, and the tables of docs/vit-questions.md written from them."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.checkpoint.layout import replace_file
from pretrain.errors import ConfigError
from pretrain.studies.questions import STUDIES, Setting, Study, directory
from pretrain.studies.runner import finished
from pretrain.studies.statistics import Comparison, compare

PAGE = Path("docs/vit-questions.md")
RESULTS = "results.json"
REMEDY = "run `python -m pretrain.studies --write`"

Scores = Mapping[str, Mapping[str, Mapping[str, float]]]
"""variant -> seed -> measure -> share of the validation images."""


def collect(studies: Sequence[Study], setting: Setting, folder: Path) -> dict[str, Any]:
    """What the finished runs of a setting scored. Seeds that some variant of a study lacks are left out of it."""
    return {
        "setting": setting.name,
        "overrides": list(setting.overrides),
        "handoff": list(setting.handoff),
        "studies": {study.name: _scores(study, setting, folder) for study in studies},
    }


def _scores(study: Study, setting: Setting, folder: Path) -> Scores:
    found: dict[str, dict[str, dict[str, float]]] = {variant.name: {} for variant in study.variants}
    for seed in range(setting.seeds):
        statuses = {
            variant.name: finished(directory(folder, variant.shared or f"{study.name}/{variant.name}", seed))
            for variant in study.variants
        }
        for name, status in statuses.items():
            if status is not None and None not in statuses.values():
                found[name][str(seed)] = _measures(status, study)
    return found


def _measures(status: Mapping[str, Any], study: Study) -> dict[str, float]:
    scores = {"top1": status["scores"]["val/top1"]}
    return scores | ({"first": status["first_scores"]["val/top1"]} if study.is_handoff else {})


def save(results: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(results, indent=1) + "\n")


def table(study: Study, scores: Scores) -> str:
    """A study's results in Markdown: a row for each variant, and below what may be read from it."""
    measures = ("first", "top1") if study.is_handoff else ("top1",)
    seeds = sorted(next(iter(scores.values())))
    if not seeds:
        return "Not measured yet."
    found = {
        measure: compare([[of[seed][measure] for seed in seeds] for of in scores.values()])
        for measure in measures
    }
    head = ["variant"]
    for measure in measures:
        head += [_title(measure, study), "difference"]
    lines = [head, ["---"] * len(head)]
    for number, name in enumerate(scores):
        cells = [f"`{name}`"]
        for comparison in found.values():
            row = comparison.rows[number]
            cells += [_with_spread(row.mean, row.spread), _difference(comparison, number)]
        lines.append(cells)
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return text + "\n\n" + " ".join(_verdict(m, c, study) for m, c in found.items())


def _title(measure: str, study: Study) -> str:
    if measure == "first":
        return "right after the hand-off"
    return "after fine-tuning" if study.is_handoff else "top-1 after training"


def _with_spread(mean: float, spread: float) -> str:
    return f"{mean:.2%}" if math.isnan(spread) else f"{mean:.2%} ± {100 * spread:.2f}"


def _difference(comparison: Comparison, number: int) -> str:
    if number == 0:
        return "compared with"
    row = comparison.rows[number]
    text = f"{100 * row.difference:+.2f}"
    return f"**{text}**" if comparison.stands_out(row) else text


def _verdict(measure: str, comparison: Comparison, study: Study) -> str:
    name = _title(measure, study)
    if comparison.seeds < 2:
        return f"{name}: one seed, so nothing here can be told from noise."
    of = f"{name}, {comparison.seeds} seeds: the smallest detectable difference is {100 * comparison.detectable:.2f} points"
    if comparison.only_noise:
        return f"{of}; no difference reaches it, so these figures show only noise."
    return f"{of}; in bold what exceeds it."


def markers(name: str) -> tuple[str, str]:
    return f"<!-- study {name}: begin -->", f"<!-- study {name}: end -->"


def with_tables(page: str, results: Mapping[str, Any]) -> str:
    """The page with the table of each study renewed; raises `ConfigError` where it has no place for one."""
    for name, scores in results["studies"].items():
        begin, end = markers(name)
        parts = re.split(f"{re.escape(begin)}.*?{re.escape(end)}", page, flags=re.DOTALL)
        if len(parts) != 2:
            raise ConfigError(f"the page has no place for the study {name}: {begin} ... {end}")
        page = f"{begin}\n{table(STUDIES[name], scores)}\n{end}".join(parts)
    return page


def read(path: Path) -> Mapping[str, Any]:
    """What `save` wrote; raises `ConfigError` where it cannot be read."""
    try:
        results: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the results {path}: {error}") from None
    return results
