"""Values and command lines as text."""

import json
import math
import re
import shlex
from typing import Any

import yaml


class MappingError(ValueError):
    """A text that cannot be read, or settings that contradict each other."""


def parse_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MappingError(f"not YAML: {' '.join(str(error).split())}") from error


def parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise MappingError(
            f"not JSON: {error.msg} in line {error.lineno}, column {error.colno} (numbers are written out, such as "
            "20971520 for 20480*32*32; strings stand in double quotes)"
        ) from error


def typed(name: str, value: Any, kind: type) -> Any:
    """A value of that type, from text or from JSON.

    Raises:
        MappingError: if it is none.
    """
    if isinstance(value, str) and kind is not str:
        product = re.fullmatch(r"\d+(\s*\*\s*\d+)+", value.strip())
        value = math.prod(int(part) for part in value.split("*")) if product else _scalar(value)
    if kind is str:
        return _scalar(value) if isinstance(value, str) else value
    if kind is bool and not isinstance(value, bool):
        raise MappingError(f"{name} is {value!r}; it must be True or False")
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise MappingError(f"{name} is {value!r}; it must be a number")
        if value == int(value):
            return int(value)
        if kind is int:
            raise MappingError(f"{name} is {value!r}; it must be a whole number")
    return value


def _scalar(text: str) -> Any:
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", text):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def read_shell(text: str) -> tuple[dict[str, str], dict[str, Any], bool]:
    """Variables, flags, and whether a script is started: a shell script, read as far as such commands go."""
    text = re.sub(r"\\[ \t]*(#.*)?\r?$", " ", text, flags=re.M)  # people put remarks behind a continuation
    text = re.sub(r"\$\(\(([\d\s*]+)\)\)", lambda found: "".join(found[1].split()), text)
    text = re.sub(r"\$\([^()]*\)|`[^`\n]*`", "$__OUTPUT_OF_A_COMMAND__", text)
    text = re.sub(r"(?<!\S)[\d&]*>>?&?[ \t]*[^\s|;&]+", " ", text)  # 2>&1, > train.log
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    variables: dict[str, str] = {}
    words: list[str] = []
    opened = filling = None  # names of a variable that was given nothing yet, and of an array

    def expand(word: str) -> str:
        return re.sub(
            r"\$\{(\w+)(?:\[[@*]\])?(?::?-([^}]*))?\}|\$(\w+)",
            lambda found: variables.get(found[1] or found[3], found[0] if found[2] is None else found[2]),
            word,
        )

    try:
        for token in lexer:
            assignment = re.fullmatch(r"(\w+)(\+?)=(.*)", token, re.S)
            if filling:
                variables[filling] += f" {shlex.quote(expand(token))}" if token != ")" else ""
                filling = None if token == ")" else filling
            elif token == "(" and opened:
                filling = opened
            elif assignment:
                name, more, value = assignment.groups()
                variables[name] = (variables.get(name, "") if more else "") + expand(value)
                opened = None if value else name
                continue
            elif re.fullmatch(r"\$\{?\w+(\[[@*]\])?\}?", token):
                words += shlex.split(expand(token))
            else:
                words.append(expand(token))
            opened = None
    except ValueError as error:
        raise MappingError(f"not a command line: {str(error).lower()}") from error
    is_script = re.compile(r"(?!--).*\.py")
    after_flag = [False, *(bool(re.fullmatch(r"--[^=]+", word)) for word in words)]
    starts = [i for i, word in enumerate(words) if is_script.fullmatch(word) and not after_flag[i]]
    flags: dict[str, Any] = {}
    name = None
    for word in words[starts[-1] + 1 if starts else 0 :]:
        if flags and re.fullmatch(r"[;&|<>()]+", word):
            break  # 2>&1 | tee log
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            flags[name] = [value] if equals else []
        elif name:
            flags[name].append(word)
    lone = {name: values[0] if len(values) == 1 else values or "True" for name, values in flags.items()}
    return variables, lone, bool(starts)
