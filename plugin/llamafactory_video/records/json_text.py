"""JSON as its author wrote it: numbers, keys and their order stay as they are."""

import json
from collections.abc import Iterator
from typing import Any


class RawNumber(float):
    """A JSON number that remembers how its author wrote it: 1.0 stays 1.0, 1e3 stays 1e3."""

    text: str

    def __new__(cls, text: str) -> "RawNumber":
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __reduce__(self) -> tuple:
        return RawNumber, (self.text,)


class _Constant(str):
    """What Python's json writes for numbers that JSON does not have: NaN, Infinity, -Infinity."""


def _constants(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Where they stand in a value, and which."""
    if isinstance(value, _Constant):
        yield path, str(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _constants(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _constants(item, f"{path}[{number}]")


class RecordDecoder(json.JSONDecoder):
    """Reads JSON values, numbers as `RawNumber`.

    What is not JSON and yet can be read past (NaN, a key twice in one object) goes into `problems`, so that one wrong
    record does not hide those after it; where it stands is told by `wrong`.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._has_constants = False
        super().__init__(
            parse_float=RawNumber,
            parse_int=RawNumber,
            parse_constant=self._constant,
            object_pairs_hook=self._unique_keys,
        )

    def _constant(self, name: str) -> "_Constant":
        self._has_constants = True
        return _Constant(name)

    def wrong(self, value: Any) -> list[str]:
        """What is wrong with a value that this decoder has read since `problems` was emptied."""
        constants = []
        if self._has_constants:
            constants = [
                f"{path or 'it'} is {name}, which is no JSON; write null" for path, name in _constants(value, "")
            ]
        self._has_constants = False
        return [*self.problems, *constants]

    def _unique_keys(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            self.problems.append(f"the key {json.dumps(twice, ensure_ascii=False)} stands twice in one object")
        return keys


def read_json(text: str) -> tuple[Any, list[str]]:
    """A JSON value, and what is wrong with it; the value holds only if nothing is."""
    decoder = RecordDecoder()
    try:
        value = decoder.decode(text)
        # A lone surrogate (\ud800) is JSON, but no text: it could be neither stored nor tokenized.
        if "\\u" in text:
            json_text(value).encode()
        return value, decoder.wrong(value)
    except UnicodeEncodeError:
        return None, ["holds half a surrogate pair (\\ud800 … \\udfff), which is no character"]
    except RecursionError:
        return None, ["nested too deeply"]
    except json.JSONDecodeError as error:
        return None, [f"not JSON: {error.msg} at character {error.pos}"]


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON text of a value read by `RecordDecoder`: its author's keys, order, numbers and characters.

    Args:
        indent: spaces for each level, or None for one line.
    """
    pad, inner = ("", "") if indent is None else ("\n", "\n" + " " * indent)
    if isinstance(value, dict | list):
        opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
        if not value:
            return opening + closing
        if isinstance(value, dict):
            items = [f"{json_text(str(key))}: {json_text(item, indent)}" for key, item in value.items()]
        else:
            items = [json_text(item, indent) for item in value]
        if indent is None:
            return opening + ", ".join(items) + closing
        # A string never holds a raw line break in JSON, so each one here is a line of a nested value.
        return opening + inner + f",{inner}".join(item.replace("\n", inner) for item in items) + pad + closing
    if isinstance(value, RawNumber):
        return value.text
    return json.dumps(value, ensure_ascii=False)


def quote(value: Any, limit: int = 60) -> str:
    """A value as it looks in an error message."""
    text = json_text(value) if isinstance(value, dict | list | str | bool | RawNumber | None) else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
