"""Answers of several models to the same questions, judged and compared: the report, its table and its verdict."""

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from .fields import MISSING, Field, fields_of, value_at
from .measures import Scored, judge, read_label
from .statistics import Interval, Resampling

SURE = 0.05
_SLICES = 40  # values of a field that are told apart
_CONFUSIONS = 40


@dataclass(frozen=True)
class Example:
    """A record that models are asked about.

    Attributes:
        source: where it comes from, unlike all others.
        clips: its clips and pictures, as they were named.
        label: the right answer.
        prompt: what was asked, for a person.
    """

    source: str
    clips: tuple[str, ...]
    label: Any
    prompt: str = ""


def recording_of(rule: str | Mapping[str, str]) -> Callable[[Sequence[str]], str]:
    """What tells the source video of a record by the names of its clips.

    Args:
        rule: "file": a clip's file, whatever part of it; "folder": the folder that it lies in; a regular expression, whose
            first group, or all of it, is searched in the file's name; or the recording of each clip, by the end of its path.
    """
    if isinstance(rule, Mapping):
        return lambda clips: _listed(rule, _file_of(clips))
    if rule not in ("file", "folder"):
        try:
            pattern = re.compile(rule)
        except re.error as error:
            raise ValueError(
                f"--source: {rule} is no regular expression ({error}); or give file, or folder"
            ) from error

    def recording(clips: Sequence[str]) -> str:
        path = _file_of(clips)
        if rule == "file":
            return path
        if rule == "folder":
            return str(PurePosixPath(path.replace("\\", "/")).parent)
        found = pattern.search(path)
        return path if found is None else found[1] if pattern.groups else found[0]

    return recording


def _file_of(clips: Sequence[str]) -> str:
    """The file of the first clip, without the part that is meant."""
    return re.sub(r"( from [\d.]+ s to .*|#[\d.]*-[\d.]*)$", "", clips[0]) if clips else ""


def _listed(recordings: Mapping[str, str], path: str) -> str:
    parts = path.replace("\\", "/").split("/")
    ends = ("/".join(parts[at:]) for at in range(len(parts)))
    return next((recordings[end] for end in ends if end in recordings), path)


@dataclass(frozen=True)
class Report:
    """What `report.json` holds, and the judged answers that it was made of."""

    value: dict[str, Any]
    scored: dict[str, Scored]


def make_report(
    examples: Sequence[Example],
    answers: Mapping[str, Sequence[str | None]],
    source: str | Mapping[str, str] = "file",
    schema: dict[str, Any] | None = None,
    by: str | None = None,
    texts: Sequence[str] = (),
    seed: int = 0,
    opinions: Mapping[tuple[str, str], float] | None = None,
) -> Report:
    """Judge models and compare each with the first.

    Args:
        answers: of each model, in the order of the examples; None where there is none.
        source: what tells the source video of a record, see `recording_of`.
        schema: a JSON Schema that answers should fit.
        by: a field of the right answers, whose values part the records.
        texts: fields that are free text, however short.
        seed: of the draws of source videos.
        opinions: of a judge on free texts, see `measures.text_pairs`.
    """
    if not examples:
        raise ValueError("there are no records to judge")
    labels = [read_label(example.label) for example in examples]
    fields = fields_of(labels, texts)
    recording = recording_of(source)
    sources = [recording(example.clips) or example.source for example in examples]
    resampling = Resampling(sources, seed)
    scored = {model: judge(labels, said, fields, schema, opinions) for model, said in answers.items()}
    first = next(iter(scored))
    value: dict[str, Any] = {
        "records": len(examples),
        "source_videos": resampling.count,
        "seed": seed,
        "fields": {field.name or "(answer)": field.kind for field in fields},
        "models": {model: _figures(each, resampling) for model, each in scored.items()},
        "answered": {model: sum(text is not None for text in said) for model, said in answers.items()},
        "lower_is_better": [name for name, figure in scored[first].figures.items() if figure.lower_is_better],
        "differences": {
            model: _differences(scored[first], each, resampling) for model, each in scored.items() if model != first
        },
        "tags": {model: _tags(each) for model, each in scored.items()},
        "confusions": {model: _confusions(each) for model, each in scored.items()},
        "lengths": {model: _lengths(each.lengths) for model, each in scored.items()},
    }
    if by is not None:
        value["by"] = {"field": by, "values": _slices(by, labels, fields, scored, resampling)}
    value["verdict"] = verdict(value)
    return Report(value, scored)


def _plain(found: Interval) -> dict[str, float | None]:
    return {name: None if math.isnan(number) else round(number, 6) for name, number in asdict(found).items()}


def _figures(scored: Scored, resampling: Resampling) -> dict[str, Any]:
    return {name: _plain(resampling.interval(figure)) for name, figure in scored.figures.items()}


def _differences(first: Scored, other: Scored, resampling: Resampling) -> dict[str, Any]:
    return {name: _plain(resampling.difference(figure, other.figures[name])) for name, figure in first.figures.items()}


def _tags(scored: Scored) -> dict[str, Any]:
    """Each value of each field: precision, recall, F1, and how often it is right."""
    told: dict[str, Any] = {}
    for name, words in scored.tags.items():
        told[name] = {}
        for word, (hit, besides, missed) in sorted(
            words.items(), key=lambda each: (-each[1][0] - each[1][2], each[0])
        ):
            told[name][word] = {
                "f1": round(2 * hit / (2 * hit + besides + missed), 4),
                "precision": round(hit / (hit + besides), 4) if hit + besides else None,
                "recall": round(hit / (hit + missed), 4) if hit + missed else None,
                "right": hit + missed,
                "said": hit + besides,
            }
    return told


def _confusions(scored: Scored) -> dict[str, Any]:
    return {
        name: [[*pair, round(count, 2)] for pair, count in counts.most_common(_CONFUSIONS)]
        for name, counts in scored.confusions.items()
    }


def _lengths(lengths: np.ndarray) -> dict[str, float]:
    least, median, most = np.quantile(lengths, [0, 0.5, 1]).tolist()
    return {"least": least, "median": median, "most": most}


def _slices(
    by: str, labels: Sequence[Any], fields: Sequence[Field], scored: Mapping[str, Scored], resampling: Resampling
) -> dict[str, Any]:
    """The score of each model where a field of the right answer has, or holds, a value."""
    path = tuple(by.split("."))
    held: list[list[str]] = []
    for label in labels:
        value = value_at(label, path)
        values = value if isinstance(value, list) else [] if value is MISSING or value is None else [value]
        held.append([str(each) for each in values if isinstance(each, str | int | float | bool)])
    counts: dict[str, int] = {}
    for values in held:
        for each in set(values):
            counts[each] = counts.get(each, 0) + 1
    if not counts:
        names = ", ".join(field.name for field in fields if field.name) or "none"
        raise ValueError(f"--by: no right answer has a field {by} of texts or numbers; it has {names}")
    first, told = next(iter(scored)), {}
    for each in sorted(counts, key=lambda value: (-counts[value], value))[:_SLICES]:
        chosen = np.array([each in values for values in held])
        told[each] = {
            "records": int(chosen.sum()),
            "models": {
                model: _plain(resampling.interval(one.figures["score"], chosen)) for model, one in scored.items()
            },
            "differences": {
                model: _plain(resampling.difference(scored[first].figures["score"], one.figures["score"], chosen))
                for model, one in scored.items()
                if model != first
            },
        }
    return told


def verdict(report: Mapping[str, Any]) -> str:
    """The report in a sentence for each model after the first, or of the one that there is."""
    models = list(report["models"])
    of = f"{report['records']} records of {report['source_videos']} source videos"
    if len(models) == 1:
        score = report["models"][models[0]]["score"]
        return f"{models[0]} scores {_with_bounds(score)} ({of})."
    told = []
    for model, differences in report["differences"].items():
        found = differences["score"]
        values = [report["models"][each]["score"]["value"] for each in (model, models[0])]
        what = "better than" if found["value"] > 0 else "worse than"
        sure = found["p"] < SURE
        begin = f"{model} is {what} {models[0]}" if sure else f"{model} and {models[0]} differ by no more than chance"
        told.append(
            f"{begin}: score {values[0]:.3f} against {values[1]:.3f}, {found['value']:+.3f} (95 % interval "
            f"{found['low']:+.3f} to {found['high']:+.3f}, {p_text(found['p'])}; {of})."
        )
        if worse := [name for name, each in fallen(report, model).items() if name != "score"]:
            told.append(f"It is worse in {', '.join(worse)}.")
    return " ".join(told)


def p_text(p: float) -> str:
    """A p value for a person."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def fallen(report: Mapping[str, Any], model: str) -> dict[str, Mapping[str, float]]:
    """The measures in which a model is worse than the first, by more than chance allows where so many are looked at.

    p values are held against Holm's bounds (Holm 1979).
    """
    lower = report["lower_is_better"]
    differences = {name: each for name, each in report["differences"][model].items() if each["value"] is not None}
    worse = {}
    for rank, (name, each) in enumerate(sorted(differences.items(), key=lambda item: item[1]["p"])):
        if each["p"] >= SURE / (len(differences) - rank):
            break
        if (each["value"] > 0) == (name in lower) and each["value"]:
            worse[name] = each
    return worse


def _with_bounds(figure: Mapping[str, float | None]) -> str:
    if figure["value"] is None:
        return "–"
    return f"{figure['value']:.3f} ({figure['low']:.3f}–{figure['high']:.3f})"


def table(report: Mapping[str, Any]) -> str:
    """The figures of all models for a terminal: value, interval, and the difference from the first with its p value."""
    models = list(report["models"])
    rows = [["", *models, *(f"{model} - {models[0]}" for model in models[1:])]]
    for name in report["models"][models[0]]:
        row = [name, *(_with_bounds(report["models"][model][name]) for model in models)]
        for model in models[1:]:
            found: Mapping[str, Any] = report["differences"][model][name]
            row.append("–" if found["value"] is None else f"{found['value']:+.3f}  {p_text(found['p'])}")
        rows.append(row)
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def _width(text: str) -> int:
    """Columns that a text takes in a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
