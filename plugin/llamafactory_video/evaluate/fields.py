"""What the answers of a data set are made of: fields and their kinds, as the right answers tell them.

    {"tags": ["凯", "团战"], "scene": "game", "kills": 3, "when": {"start": 1.5, "end": 4}, "hero": {"name": "凯"}}

has the fields tags (tags), scene (words), kills (number), when (span) and hero.name (words). An answer that is no JSON
object is one field, whose path is empty.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..records.json_text import read_json

Kind = Literal["tags", "text", "words", "choice", "number", "boolean", "span", "spans", "objects", "value"]
LONG = 24  # characters, on average, from which a text is free text, not a word of some
MISSING = object()  # in place of a field that an answer does not have
_ENDS = (("start", "end"), ("begin", "end"), ("start_time", "end_time"), ("from", "to"), ("video_start", "video_end"))
_CHOICE = re.compile(r"\W*([A-Ha-h])(?![\w一-鿿])")  # a letter that stands for itself


@dataclass(frozen=True)
class Field:
    """A field of answers: where it stands, and what it holds."""

    path: tuple[str, ...]
    kind: Kind

    @property
    def name(self) -> str:
        return ".".join(self.path)


def parse_answer(text: str) -> Any:
    """The JSON value of an answer, or MISSING. A fence of Markdown around it is no part of it."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", text, re.DOTALL)
    value, problems = read_json(fenced[1] if fenced else text)
    return MISSING if problems else value


def is_number(value: Any) -> bool:
    """Whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def seconds_of(value: Any) -> float | None:
    """A time in seconds: a number, or a text such as 12.5, 12.5s, 1:02 or 1:02:03.5."""
    if is_number(value):
        return float(value)
    parts = (
        re.fullmatch(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)\s*s?", value.strip()) if isinstance(value, str) else None
    )
    return None if parts is None else 3600 * int(parts[1] or 0) + 60 * int(parts[2] or 0) + float(parts[3])


def span_of(value: Any) -> tuple[float, float] | None:
    """Start and end in seconds of an object with both, or of a list of two times; None if it is neither."""
    ends: Sequence[Any] = ()
    if isinstance(value, dict):
        ends = next(([value[a], value[b]] for a, b in _ENDS if a in value and b in value), ())
    elif isinstance(value, list) and len(value) == 2:
        ends = value
    times = [seconds_of(end) for end in ends]
    return (times[0], times[1]) if times and None not in times and times[0] <= times[1] else None


def label_of(span: Any) -> str:
    """What a span is called: the first text beside its ends, or ""."""
    ends = {end for pair in _ENDS for end in pair}
    texts = (value for key, value in span.items() if key not in ends and isinstance(value, str))
    return next(texts, "") if isinstance(span, dict) else ""


def choice_of(text: str) -> str | None:
    """The letter that an answer to a multiple choice question begins with, A to H; None without one."""
    found = _CHOICE.match(text)
    return None if found is None else found[1].upper()


def value_at(value: Any, path: tuple[str, ...]) -> Any:
    """What an answer holds in a field, or MISSING."""
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return MISSING
        value = value[key]
    return value


def fields_of(labels: Sequence[Any], texts: Sequence[str] = ()) -> list[Field]:
    """The fields of right answers, in the order in which they are first seen.

    Args:
        labels: right answers; JSON values, or texts.
        texts: names of fields that are free text, however short.
    """
    fields: list[Field] = []

    def look(values: list[Any], path: tuple[str, ...]) -> None:
        values = [value for value in values if value is not None]
        if not values:
            return
        if all(isinstance(value, dict) for value in values) and not all(span_of(value) for value in values):
            for key in dict.fromkeys(key for value in values for key in value):
                look([value[key] for value in values if key in value], (*path, key))
            return
        kind = "text" if ".".join(path) in texts else _kind(values)
        fields.append(Field(path, kind))

    look(list(labels), ())
    return fields


def _kind(values: list[Any]) -> Kind:
    if all(isinstance(value, bool) for value in values):
        return "boolean"
    if all(map(is_number, values)):
        return "number"
    if all(isinstance(value, str) for value in values):
        if all(re.fullmatch(r"\(?[A-H]\)?\.?", value.strip()) for value in values):
            return "choice"
        return "text" if sum(map(len, values)) > LONG * len(values) else "words"
    if all(span_of(value) for value in values):
        return "span"
    if all(isinstance(value, list) for value in values):
        items = [item for value in values for item in value]
        if all(isinstance(item, str) for item in items):
            return "tags"
        if all(span_of(item) for item in items):
            return "spans"
        if all(isinstance(item, dict) for item in items):
            return "objects"
    return "value"
