"""JSON Schemas of answers: read from a file, or told by the answers of a data set."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .json_text import json_text, read_json
from .question import read_questions


def given_schema(
    file: Path | None, data: Path | None, vocabularies: Sequence[str], names: tuple[str, str, str]
) -> dict[str, Any] | None:
    """The JSON Schema that a recipe or a command asks for; None if it asks for none.

    Args:
        file: that holds it.
        data, vocabularies: in its place, see `schema_of_answers`.
        names: by which the person who asks knows the three.

    Raises:
        ValueError: if they contradict each other, or give no schema.
    """
    if file is not None and data is not None:
        raise ValueError(f"{names[0]} stands beside {names[1]}; give one of them")
    if vocabularies and data is None:
        raise ValueError(f"{names[2]} needs {names[1]}, the records whose answers are the vocabulary")
    if file is not None:
        return read_schema(file)
    return None if data is None else schema_of_answers(data, vocabularies)


def check_schema(schema: Any, where: str) -> dict[str, Any]:
    """A JSON Schema that is one (draft 2020-12).

    Raises:
        ValueError: naming the place in it that is wrong.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError as WrongSchema

    if not isinstance(schema, dict):
        raise ValueError(f"{where}: a JSON Schema is an object; this is {json.dumps(schema, ensure_ascii=False)[:80]}")
    try:
        Draft202012Validator.check_schema(schema)
    except WrongSchema as error:
        place = ".".join(map(str, error.absolute_path)) or "the schema"
        raise ValueError(f"{where}: no JSON Schema: {place}: {error.message}") from None
    return schema


def read_schema(file: Path) -> dict[str, Any]:
    """The JSON Schema of a file.

    Raises:
        ValueError: if it holds none.
    """
    if not file.is_file():
        raise ValueError(f"no file {file}; a file with a JSON Schema is needed")
    try:
        return check_schema(json.loads(file.read_text(encoding="utf-8")), str(file))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None


def schema_of_answers(data: Path, vocabularies: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON Schema of the answers of a data set: their keys, in order, their types, and which are always there.

    Args:
        data: annotations, a .json or .jsonl file or a folder of them.
        vocabularies: fields that hold one of the texts seen there, or a list of them; `a.b` is b in the object a, or in each
            object of the list a.

    Raises:
        ValueError: if an answer is not JSON, or no answer has a field.
    """
    from genson import SchemaBuilder

    builder, seen = SchemaBuilder(), {name: Counter() for name in vocabularies}
    for each in read_questions(data):
        if each.label is None:
            continue
        text = each.label if isinstance(each.label, str) else json_text(each.label)
        if problems := read_json(text)[1]:
            raise ValueError(f"{each.source}: its answer is {problems[0]}, so that no schema can be told from it")
        answer = json.loads(text)
        builder.add_object(answer)
        for name, texts in seen.items():
            texts.update(_texts(answer, name.split(".")))
    schema = builder.to_schema()
    schema.pop("$schema", None)
    if not schema:
        raise ValueError(f"{data}: no record has an answer, so that no schema can be told")
    _close(schema)
    for name, texts in seen.items():
        if not texts:
            known = ", ".join(_fields(schema)) or "none"
            raise ValueError(
                f"{data}: no answer has a text, or a list of texts, in the field {name}; fields are {known}"
            )
        for place in _places(schema, name.split(".")):
            vocabulary = {"enum": [text for text, _ in texts.most_common()]}
            others = [] if place["type"] == "string" else [kind for kind in place["type"] if kind != "string"]
            place.clear()
            place |= {"anyOf": [vocabulary, {"type": others}]} if others else vocabulary
    return schema


def _close(schema: Any) -> None:
    """Objects have no other keys than those that were seen."""
    if isinstance(schema, list):
        for each in schema:
            _close(each)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            for each in value.values() if key == "properties" else [value]:
                _close(each)
        if "properties" in schema:
            schema["additionalProperties"] = False


def _texts(value: Any, names: list[str]) -> list[str]:
    """The texts in a field of an answer."""
    if isinstance(value, list):
        return [text for each in value for text in _texts(each, names)]
    if names:
        return _texts(value[names[0]], names[1:]) if isinstance(value, dict) and names[0] in value else []
    return [value] if isinstance(value, str) else []


def _places(schema: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """The schemas of a field's texts."""
    if "anyOf" in schema:
        return [place for each in schema["anyOf"] for place in _places(each, names)]
    if "items" in schema:
        return _places(schema["items"], names)
    if names:
        part = schema.get("properties", {}).get(names[0])
        return _places(part, names[1:]) if part else []
    return [schema] if "string" in schema.get("type", ()) else []


def _fields(schema: dict[str, Any], before: str = "") -> list[str]:
    parts = [*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else [])]
    found = [name for part in parts for name in _fields(part, before)]
    for name, part in schema.get("properties", {}).items():
        found += [before + name, *_fields(part, f"{before}{name}.")]
    return found
