"""Results as data in docs/studies, and what they say: a table for each study, and in a word what stands out of it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.documents import write_object
from pretrain.errors import ConfigError
from pretrain.studies.questions import Setting, Study, directory
from pretrain.studies.runner import finished
from pretrain.studies.statistics import Comparison, Row, compare

RESULTS = "results.json"
NOISE = "noise"

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
    write_object(path, results)


def read(path: Path) -> Mapping[str, Any]:
    """What `save` wrote; raises `ConfigError` where it cannot be read."""
    try:
        results: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the results {path}: {error}") from None
    return results


def compared(study: Study, scores: Scores) -> dict[str, Comparison]:
    """Each measure of a study, its variants with the first one; none where no seed is complete."""
    seeds, names = sorted(next(iter(scores.values()))), list(scores)
    groups = [[names.index(name) for name in group] for group in study.groups]
    copies = [names.index(name) for name in study.copies]
    measures = ("first", "top1") if study.is_handoff else ("top1",)
    return {
        measure: compare([[of[seed][measure] for seed in seeds] for of in scores.values()], groups, copies)
        for measure in measures
        if seeds
    }


def findings(study: Study, scores: Scores) -> dict[str, str]:
    """For each measure the variants that stand out, as `below: none; relative, above: rope_2d`, or `noise`."""
    names = list(scores)
    found = {}
    for measure, comparison in compared(study, scores).items():
        pairs = list(zip(names, comparison.rows, strict=True))
        below = [name for name, row in pairs if row.stands_out and row.difference < 0]
        above = [name for name, row in pairs if row.stands_out and row.difference > 0]
        words = [f"{word}: {'; '.join(of)}" for word, of in (("below", below), ("above", above)) if of]
        found[measure] = ", ".join(words) or NOISE
    return found


def table(study: Study, scores: Scores) -> str:
    """A study's results in Markdown: a row for each variant, and below what may be read from it."""
    found = compared(study, scores)
    if not found:
        return "Not measured yet."
    head = ["variant"]
    for measure in found:
        head += [_title(measure, study), "difference"]
    lines = [head, ["---"] * len(head)]
    for number, name in enumerate(scores):
        cells = [f"`{name}`"]
        for comparison in found.values():
            row = comparison.rows[number]
            cells += [
                _with_spread(row.mean, row.spread),
                _difference(row) if number else "compared with",
            ]
        lines.append(cells)
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return text + "\n\n" + " ".join(_verdict(m, c, study, list(scores)) for m, c in found.items())


def _title(measure: str, study: Study) -> str:
    if measure == "first":
        return "right after the hand-off"
    return "after fine-tuning" if study.is_handoff else "top-1 after training"


def _with_spread(mean: float, spread: float) -> str:
    return f"{mean:.2%}" if math.isnan(spread) else f"{mean:.2%} ± {100 * spread:.2f}"


def _difference(row: Row) -> str:
    text = f"{100 * row.difference:+.2f}"
    return f"**{text}**" if row.stands_out else text


def _verdict(measure: str, comparison: Comparison, study: Study, names: Sequence[str]) -> str:
    name = _title(measure, study)
    if comparison.seeds < 2:
        return f"{name}: one seed, so nothing here can be told from noise."
    groups = study.groups or (names[1:],)
    bounds = [100 * comparison.rows[names.index(group[0])].detectable for group in groups]
    points = " and ".join(
        f"{bound:.2f} points" + (f" for {', '.join(f'`{each}`' for each in group)}" if study.groups else "")
        for bound, group in zip(bounds, groups, strict=True)
    )
    of = f"{name}, {comparison.seeds} seeds: the smallest detectable difference is {points}"
    if comparison.only_noise:
        return f"{of}; no difference reaches it, so these figures show only noise."
    return f"{of}; in bold what exceeds it."
