"""The keys that a recipe may have, as the sources of LLaMA-Factory and transformers state them; neither is imported.

So a wrong key or value is told in the first seconds, and once, not by each of eight processes.
"""

import ast
import functools
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_type_hints

from ..words import meant
from .keys import VideoDataKeys, VideoFinetuningKeys, VideoModelKeys, check_value

_ARGUMENTS = {
    "llamafactory": ("hparams/*.py",),
    "transformers": ("training_args.py", "training_args_seq2seq.py"),
}
_ENUMS = {
    "llamafactory": ("extras/constants.py",),
    "transformers": ("training_args.py", "trainer_utils.py"),
}
_OURS = (VideoModelKeys, VideoDataKeys, VideoFinetuningKeys)


def _classes(sources: dict[str, tuple[str, ...]]) -> list[ast.ClassDef]:
    found = []
    for package, patterns in sources.items():
        folder = Path(next(iter(find_spec(package).submodule_search_locations)))
        for file in (file for pattern in patterns for file in sorted(folder.glob(pattern))):
            body = ast.parse(file.read_text(encoding="utf-8")).body
            found += [node for node in body if isinstance(node, ast.ClassDef)]
    return found


def _enums() -> dict[str, Any]:
    """Enumerations by name, as the texts that their values are."""
    names = {}
    for node in _classes(_ENUMS):
        values = [item.value.value for item in node.body if isinstance(item, ast.Assign) and _is_text(item.value)]
        if values and any("Enum" in ast.unparse(base) for base in node.bases):
            names[node.name] = Literal[tuple(values)]
    return names


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@functools.cache
def known_keys() -> Mapping[str, Any]:
    """The type of each key; None where its values cannot be told by that."""
    scope = {"Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union, **_enums()}
    keys: dict[str, Any] = {}
    for node in _classes(_ARGUMENTS):
        for item in node.body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            if any(
                word.arg == "init" and ast.unparse(word.value) == "False"
                for word in getattr(item.value, "keywords", ())
            ):
                continue
            try:
                keys[item.target.id] = eval(
                    ast.unparse(item.annotation), {}, scope
                )  # an annotation of a pinned release
            except (NameError, TypeError):
                keys[item.target.id] = None
    for cls in _OURS:
        keys |= {name: hint for name, hint in get_type_hints(cls).items() if cls.__dataclass_fields__[name].init}
    return keys


def check_given(given: Mapping[str, Any]) -> None:
    """See that a recipe's keys are known, and their values of the right type.

    Raises:
        ValueError: naming the first that is wrong, and what would be right.
    """
    known = known_keys()
    unknown = [f"{name}{meant(name, known)}" for name in given if name not in known]
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)}")
    for name, value in given.items():
        check_value(name, value, known[name])
