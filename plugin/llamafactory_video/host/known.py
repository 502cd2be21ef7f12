"""A recipe as it stands in its file, and what it may name: keys, as the sources of LLaMA-Factory and transformers state them without being imported; data sets.

So a wrong key or value is told in the first seconds, and once, not by each of eight processes.
"""

import ast
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_type_hints

from ..words import meant, nearest
from .core import TEMPLATE, THINKING_TEMPLATE, is_ours
from .keys import KEYS, check_value, listed

_ARGUMENTS = {
    "llamafactory": ("hparams/*.py",),
    "transformers": ("training_args.py", "training_args_seq2seq.py"),
}
_ENUMS = {
    "llamafactory": ("extras/constants.py",),
    "transformers": ("training_args.py", "trainer_utils.py"),
}
_FILES = ("deepspeed", "fsdp_config")


def _folder(package: str) -> Path:
    return Path(next(iter(find_spec(package).submodule_search_locations)))


def _classes(sources: dict[str, tuple[str, ...]]) -> list[ast.ClassDef]:
    found = []
    for package, patterns in sources.items():
        for file in (file for pattern in patterns for file in sorted(_folder(package).glob(pattern))):
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


def _reporters() -> list[str]:
    """What transformers reports to, as `report_to` names it."""
    source = (_folder("transformers") / "integrations" / "integration_utils.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INTEGRATION_TO_CALLBACK":
            return [key.value for key in node.value.keys]
    return []


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
    for cls in KEYS:
        keys |= {name: hint for name, hint in get_type_hints(cls).items() if cls.__dataclass_fields__[name].init}
    return keys


def shipped(part: str) -> list[Path]:
    """The files of a folder that goes with the package: inside it where it was installed, beside it in a clone."""
    inside, beside = (Path(__file__).parents[depth] / part for depth in (1, 3))
    folder = inside if inside.is_dir() else beside
    return sorted(file for file in folder.iterdir() if file.suffix in (".yaml", ".json", ".md"))


def read_recipe(file: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a recipe, read as LLaMA-Factory reads them, by omegaconf.

    Args:
        overrides: `key=value`, which stand over the file.

    Raises:
        ValueError: saying why it cannot be read.
    """
    import yaml
    from omegaconf import DictConfig, OmegaConf

    try:
        recipe = OmegaConf.load(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, DictConfig):
        raise ValueError("lines of `key: value` are needed")
    return OmegaConf.to_container(OmegaConf.merge(recipe, OmegaConf.from_cli(list(overrides))))


def check_given(given: Mapping[str, Any]) -> None:
    """See that a recipe's keys are known, and their values of the right type.

    Raises:
        ValueError: naming the first that is wrong, and what would be right.
    """
    known = known_keys()
    if os.environ.get("ALLOW_EXTRA_ARGS", "0").lower() in ("true", "y", "1"):  # LLaMA-Factory's
        given = {name: value for name, value in given.items() if name in known}
    unknown = [f"{name}{meant(name, known)}" for name in given if name not in known]
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)}")
    for name, value in given.items():
        check_value(name, value, known[name])
    for name in _FILES:
        if isinstance(file := given.get(name), str) and file.endswith(".json") and not os.path.isfile(file):
            folder = os.path.dirname(file) or "."
            others = os.listdir(folder) if os.path.isdir(folder) else []
            raise ValueError(f"{name}: no file {file}{meant(os.path.basename(file), others)}")
    for tool in listed(report) if isinstance(report := given.get("report_to"), str) else ():
        check_value("report_to", tool, Literal[("none", "all", *_reporters())])


def check_datasets(dataset_dir: Any, *given: Any, must_be_there: bool = False) -> None:
    """See that data sets are in dataset_info.json, where it is a file.

    Args:
        must_be_there: whether it has to be one.
        given: names with commas between them, or lists of names.

    Raises:
        ValueError: naming the first that is not, beside those that are.
    """
    names = [name for each in given for name in (listed(each) if isinstance(each, str) else each or ())]
    if not names or not isinstance(dataset_dir, str) or dataset_dir == "ONLINE" or dataset_dir.startswith("REMOTE:"):
        return
    file = Path(dataset_dir, "dataset_info.json")
    if not file.is_file() and not must_be_there:
        return
    if not file.is_file():
        raise ValueError(f"dataset_dir: no file {file}, which would name the data set {names[0]}")
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    for name in names:
        if name not in known:
            raise ValueError(f"no data set {name} in {file}{meant(name, known)}; it has {', '.join(known) or 'none'}")


def check_template(given: Any) -> None:
    """See that it is not a slip in the name of one of our templates; others are LLaMA-Factory's to judge.

    Raises:
        ValueError: naming the one that is meant.
    """
    if not isinstance(given, str) or is_ours(given):
        return
    source = (_folder("llamafactory") / "data" / "template.py").read_text(encoding="utf-8")
    known = [TEMPLATE, THINKING_TEMPLATE, *re.findall(r'name="([^"]+)"', source)]
    if given not in known and is_ours(near := nearest(given, known)):
        raise ValueError(f"there is no template {given}; is {near} meant?")
