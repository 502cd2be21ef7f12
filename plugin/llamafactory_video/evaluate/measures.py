"""What answers are worth, field by field: each measure a `Figure` over records, and a score in 0..1 for each record.

Where an answer is not JSON, or lacks a field, all of the field's right values are missed. A tag that is said twice counts
once. Fields that no right answer has are counted (`extra_fields`), and otherwise left alone.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .fields import (
    MISSING,
    Field,
    choice_of,
    fields_of,
    is_number,
    label_of,
    parse_answer,
    span_of,
    value_at,
)
from .statistics import AveragePrecision, Figure, Ratio, mean_of
from .texts import chrf, normalised, rouge_l

RECALLS = (0.3, 0.5, 0.7)


@dataclass
class Scored:
    """One model's answers, judged.

    Attributes:
        figures: by name, `FIELD.MEASURE`; those of whole answers have no field.
        scores: of each record, the mean over its fields, (n,) in 0..1.
        tags: of each field of tags or words, for each value: how often it was right, said besides, and missed.
        confusions: of each of these fields, (right, said in its place) -> how often.
        lengths: characters of each answer, (n,).
        opinions: what a judge thinks of free texts, by (right, said), in 0..1.
    """

    figures: dict[str, Figure]
    scores: np.ndarray
    tags: dict[str, dict[str, tuple[int, int, int]]] = field(default_factory=dict)
    confusions: dict[str, Counter] = field(default_factory=dict)
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0))
    opinions: Mapping[tuple[str, str], float] = field(default_factory=dict)


def judge(
    labels: Sequence[Any],
    answers: Sequence[str | None],
    fields: Sequence[Field] | None = None,
    schema: dict[str, Any] | None = None,
    opinions: Mapping[tuple[str, str], float] | None = None,
) -> Scored:
    """Judge answers by the right ones.

    Args:
        labels: right answers, JSON values or texts; texts that are JSON objects or lists are read as such.
        answers: of one model, in the same order; None where there is none.
        fields: see `fields_of`, which tells them from the labels.
        schema: a JSON Schema that answers should fit.
        opinions: of a judge on free texts, see `text_pairs`.
    """
    labels = [read_label(label) for label in labels]
    fields = fields_of(labels) if fields is None else fields
    texts = [answer or "" for answer in answers]
    is_json = any(isinstance(label, dict | list) for label in labels)
    said = [parse_answer(text) if is_json else text.strip() or MISSING for text in texts]
    figures: dict[str, Figure] = {}
    if is_json:
        figures["json"] = mean_of([value is not MISSING for value in said])
    if schema is not None:
        figures["schema"] = mean_of(_fit(said, schema))
    figures["exact"] = mean_of([_same(a, b) for a, b in zip(labels, said, strict=True)])
    known = {key for label in labels if isinstance(label, dict) for key in label}
    if known:
        figures["extra_fields"] = mean_of(
            [isinstance(value, dict) and bool(value.keys() - known) for value in said], lower_is_better=True
        )
    scored = Scored(figures, np.zeros(len(labels)), opinions=opinions or {})
    scored.lengths = np.array([len(text) for text in texts])
    totals, counts = np.zeros(len(labels)), np.zeros(len(labels))
    for each in fields:
        right = [value_at(label, each.path) for label in labels]
        there = [value_at(value, each.path) for value in said]
        asked = np.array([value is not MISSING and value is not None for value in right])
        score = _JUDGES[each.kind](scored, each.name, right, there, asked)
        totals, counts = totals + score * asked, counts + asked
    scored.scores = totals / np.maximum(counts, 1)
    figures["score"] = mean_of(scored.scores, counts > 0)
    return scored


def read_label(label: Any) -> Any:
    """A right answer as a value: a text that holds a JSON object or list is that."""
    if not isinstance(label, str):
        return label
    value = parse_answer(label)
    return value if isinstance(value, dict | list) else label.strip()


def _fit(said: Sequence[Any], schema: dict[str, Any]) -> list[bool]:
    from jsonschema.validators import validator_for

    validator = validator_for(schema)(schema)
    return [value is not MISSING and validator.is_valid(value) for value in said]


def _same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal: true is not 1, the order of keys says nothing."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _named(name: str, measure: str) -> str:
    return f"{name}.{measure}" if name else measure


def _strings(value: Any) -> set[str]:
    return {normalised(item) for item in value if isinstance(item, str)} if isinstance(value, list) else set()


def _judge_tags(scored: Scored, name: str, right: list, there: list, asked: np.ndarray) -> np.ndarray:
    """Sets of words: precision, recall and F1 over all (micro), F1 as a mean over tags (macro) and over records."""
    wanted = [_strings(value) if ask else set() for value, ask in zip(right, asked, strict=True)]
    said = [_strings(value) if ask else set() for value, ask in zip(there, asked, strict=True)]
    hits = np.array([len(a & b) for a, b in zip(wanted, said, strict=True)], float)
    sizes = np.array([(len(a), len(b)) for a, b in zip(wanted, said, strict=True)], float).reshape(-1, 2)
    both = sizes.sum(axis=1)
    score = np.where(both > 0, 2 * hits / np.maximum(both, 1), 1.0)
    scored.figures[_named(name, "f1")] = Ratio(2 * hits[:, None], both[:, None])
    scored.figures[_named(name, "precision")] = Ratio(hits[:, None], sizes[:, 1:])
    scored.figures[_named(name, "recall")] = Ratio(hits[:, None], sizes[:, :1])
    scored.figures[_named(name, "f1_records")] = mean_of(score, asked)
    _count_words(scored, name, wanted, said)
    return score


def _count_words(scored: Scored, name: str, wanted: list[set[str]], said: list[set[str]]) -> None:
    """The mean of F1 over the words that are right somewhere, the figures of each, and which stands for which."""
    words = sorted(set().union(*wanted))
    column = {word: i for i, word in enumerate(words)}
    over, under = np.zeros((len(wanted), len(words))), np.zeros((len(wanted), len(words)))
    counts: dict[str, list[int]] = {}
    confusions: Counter = Counter()
    for row, (a, b) in enumerate(zip(wanted, said, strict=True)):
        for kind, part in enumerate((a & b, b - a, a - b)):
            for word in part:
                counts.setdefault(word, [0, 0, 0])[kind] += 1
                if word in column:
                    over[row, column[word]] += 2 * (kind == 0)
                    under[row, column[word]] += 2 if kind == 0 else 1
        missed, besides = a - b, b - a
        for word in missed:
            for other in besides:  # each missed one is spread over those that were said in its place
                confusions[word, other] += 1 / len(besides)
    if words:
        scored.figures[_named(name, "f1_macro")] = Ratio(over, under)
    scored.tags[name] = {word: tuple(numbers) for word, numbers in counts.items()}
    scored.confusions[name] = confusions


def _judge_words(scored: Scored, name: str, right: list, there: list, asked: np.ndarray) -> np.ndarray:
    """One short text: equal as it stands, and normalised."""
    exact = [isinstance(b, str) and a == b for a, b in zip(right, there, strict=True)]
    wanted = [normalised(a) if ask else "" for a, ask in zip(right, asked, strict=True)]
    said = [normalised(b) if isinstance(b, str) else "" for b in there]
    scored.figures[_named(name, "exact")] = mean_of(exact, asked)
    return _judge_one_of(scored, name, wanted, said, asked)


def _judge_one_of(
    scored: Scored, name: str, wanted: list[str | None], said: list[str | None], asked: np.ndarray
) -> np.ndarray:
    """One word of several: whether it is the right one, and which is said in place of which."""
    score = np.array([a == b for a, b in zip(wanted, said, strict=True)], float)
    scored.figures[_named(name, "accuracy")] = mean_of(score, asked)
    _count_words(scored, name, [{a} if a else set() for a in wanted], [{b} if b else set() for b in said])
    return score


def _judge_text(scored: Scored, name: str, right: list, there: list, asked: np.ndarray) -> np.ndarray:
    """Free text: ROUGE-L and chrF."""
    pairs = [
        (a, b if isinstance(b, str) else "") if ask else ("", "")
        for a, b, ask in zip(right, there, asked, strict=True)
    ]
    for measure, of in (("rouge_l", rouge_l), ("chrf", chrf)):
        score = np.array([of(a, b) if ask else 0.0 for (a, b), ask in zip(pairs, asked, strict=True)])
        scored.figures[_named(name, measure)] = mean_of(score, asked)
    if scored.opinions:  # of an answer without this text nobody was asked: it is worth nothing
        thought = [scored.opinions.get(pair, 0.0 if not pair[1] else None) for pair in pairs]
        known = np.array([each is not None for each in thought])
        scored.figures[_named(name, "judge")] = mean_of([each or 0.0 for each in thought], asked & known)
    return score


def text_pairs(labels: Sequence[Any], answers: Sequence[str | None], fields: Sequence[Field]) -> set[tuple[str, str]]:
    """The free texts of right answers, and what was said in their place, for a judge."""
    pairs = set()
    for label, answer in zip(map(read_label, labels), answers, strict=True):
        value = parse_answer(answer or "") if isinstance(label, dict | list) else (answer or "").strip()
        for each in fields:
            right, said = value_at(label, each.path), value_at(value, each.path)
            if each.kind == "text" and isinstance(right, str) and isinstance(said, str) and said:
                pairs.add((right, said))
    return pairs


def _judge_choice(scored: Scored, name: str, right: list, there: list, asked: np.ndarray) -> np.ndarray:
    """A letter of several: what the answer begins with."""
    wanted = [choice_of(a) if ask else None for a, ask in zip(right, asked, strict=True)]
    said = [choice_of(b) if isinstance(b, str) else None for b in there]
    return _judge_one_of(scored, name, wanted, said, asked)


def _judge_number(scored: Scored, name: str, right: list, there: list, asked: np.ndarray) -> np.ndarray:
    """A number: equal, and how far off where one is said."""
    told = np.array([is_number(b) for b in there])
    off = [
        abs(float(a) - float(b)) if ask and t else 0.0 for a, b, ask, t in zip(right, there, asked, told, strict=True)
    ]
    score = told * (np.array(off) == 0)
    scored.figures[_named(name, "exact")] = mean_of(score, asked)
    scored.figures[_named(name, "error")] = mean_of(off, asked & told, lower_is_better=True)
    return score.astype(float)


def _judge_equal(scored: Scored, name: str, right: list, there: list, asked: np.ndarray) -> np.ndarray:
    """Truth values, and what is of several kinds: equal."""
    score = np.array([b is not MISSING and _same(a, b) for a, b in zip(right, there, strict=True)], float)
    scored.figures[_named(name, "exact")] = mean_of(score, asked)
    return score


def iou(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Temporal intersection over union of two spans."""
    shared = min(a[1], b[1]) - max(a[0], b[0])
    whole = max(a[1], b[1]) - min(a[0], b[0])
    return 1.0 if a == b else max(0.0, shared) / whole


def _judge_span(scored: Scored, name: str, right: list, there: list, asked: np.ndarray) -> np.ndarray:
    """One span: IoU, and the share of records whose IoU is at least 0.3, 0.5, 0.7."""
    pairs = [(span_of(a), span_of(b)) for a, b in zip(right, there, strict=True)]
    score = np.array([iou(a, b) if a and b else 0.0 for a, b in pairs])
    scored.figures[_named(name, "iou")] = mean_of(score, asked)
    for least in RECALLS:
        scored.figures[_named(name, f"recall@{least}")] = mean_of(score >= least, asked)
    return score


def _matched(table: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of rows and columns with the greatest sum, none used twice (Kuhn 1955)."""
    from scipy.optimize import linear_sum_assignment

    return [(int(i), int(j)) for i, j in zip(*linear_sum_assignment(-table), strict=True)] if table.size else []


def _judge_spans(scored: Scored, name: str, right: list, there: list, asked: np.ndarray) -> np.ndarray:
    """Lists of spans: matched by label and IoU; recall and F1 at 0.3, 0.5, 0.7, and mean average precision."""

    def spans(value: Any) -> list[tuple[tuple[float, float], str]]:
        found = [(span_of(item), normalised(label_of(item))) for item in value] if isinstance(value, list) else []
        return [(span, label) for span, label in found if span is not None]

    wanted = [spans(a) if ask else [] for a, ask in zip(right, asked, strict=True)]
    said = [spans(b) if ask else [] for b, ask in zip(there, asked, strict=True)]
    overlaps: list[list[float]] = []
    scores = np.ones(len(right))
    for row, (a, b) in enumerate(zip(wanted, said, strict=True)):
        table = np.array([[iou(x, y) if p == q else 0.0 for y, q in b] for x, p in a]).reshape(len(a), len(b))
        overlaps.append([float(table[i, j]) for i, j in _matched(table)])
        if a or b:
            scores[row] = 2 * sum(overlaps[-1]) / (len(a) + len(b))
    sizes = np.array([(len(a), len(b)) for a, b in zip(wanted, said, strict=True)], float).reshape(-1, 2)
    for least in RECALLS:
        hits = np.array([sum(overlap >= least for overlap in row) for row in overlaps], float)
        scored.figures[_named(name, f"recall@{least}")] = Ratio(hits[:, None], sizes[:, :1])
        scored.figures[_named(name, f"f1@{least}")] = Ratio(2 * hits[:, None], sizes.sum(axis=1, keepdims=True))
    scored.figures[_named(name, "iou")] = mean_of(scores, asked)
    if any(label for each in wanted for _, label in each):
        scored.figures[_named(name, "map@0.5")] = _average_precision(wanted, said, 0.5)
    return scores


def _average_precision(wanted: list, said: list, least: float) -> AveragePrecision:
    """Detections of all records by label; answers have no confidence, so what is said first is the surest."""
    labels = sorted({label for row in wanted for _, label in row})
    counts = np.array([[sum(label == each for _, each in row) for label in labels] for row in wanted], float)
    hits = []
    for label in labels:
        detections = sorted(
            (rank, row) for row, each in enumerate(said) for rank, (_, found) in enumerate(each) if found == label
        )
        taken: set[tuple[int, int]] = set()
        is_hit = []
        for rank, row in detections:
            overlaps = [
                (iou(said[row][rank][0], span), i)
                for i, (span, each) in enumerate(wanted[row])
                if each == label and (row, i) not in taken
            ]
            best = max(overlaps, default=(0.0, -1))
            is_hit.append(best[0] >= least)
            if is_hit[-1]:
                taken.add((row, best[1]))
        hits.append((np.array(is_hit, bool), np.array([row for _, row in detections], int)))
    return AveragePrecision(hits, counts.reshape(len(wanted), len(labels)))


def _judge_objects(scored: Scored, name: str, right: list, there: list, asked: np.ndarray) -> np.ndarray:
    """Lists of objects: paired so that they are most alike; the share of all that is right in the pairs."""
    scores = np.ones(len(right))
    over, under = np.zeros(len(right)), np.zeros(len(right))
    for row, (a, b) in enumerate(zip(right, there, strict=True)):
        if not asked[row]:
            continue
        objects = [each for each in b if isinstance(each, dict)] if isinstance(b, list) else []
        table = np.array([[likeness(x, y) for y in objects] for x in a]).reshape(len(a), len(objects))
        over[row], under[row] = 2 * sum(table[i, j] for i, j in _matched(table)), len(a) + len(objects)
        scores[row] = over[row] / under[row] if under[row] else 1.0
    scored.figures[_named(name, "f1")] = Ratio(over[:, None], under[:, None])
    return scores


def likeness(a: Any, b: Any) -> float:
    """How alike two values of answers are, in 0..1: the mean over the keys that either has; texts by their words."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = a.keys() | b.keys()
        return sum(likeness(a.get(key), b.get(key)) for key in keys) / len(keys) if keys else 1.0
    if isinstance(a, list) and isinstance(b, list):
        if not a and not b:
            return 1.0
        table = np.array([[likeness(x, y) for y in b] for x in a]).reshape(len(a), len(b))
        return 2 * sum(table[i, j] for i, j in _matched(table)) / (len(a) + len(b))
    if isinstance(a, str) and isinstance(b, str):
        return 1.0 if normalised(a) == normalised(b) else rouge_l(a, b) if max(len(a), len(b)) > 24 else 0.0
    return float(_same(a, b))


_JUDGES = {
    "tags": _judge_tags,
    "words": _judge_words,
    "text": _judge_text,
    "choice": _judge_choice,
    "number": _judge_number,
    "boolean": _judge_equal,
    "value": _judge_equal,
    "span": _judge_span,
    "spans": _judge_spans,
    "objects": _judge_objects,
}
