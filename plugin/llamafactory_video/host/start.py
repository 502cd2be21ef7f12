"""How `llamafactory-cli` starts and fails: wrong recipes are told in seconds, and what a person can mend has no traceback."""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from ..words import meant
from .core import is_ours
from .known import check_datasets, check_given, check_template, read_recipe

_COMMANDS = ("train", "chat", "webchat", "api", "export")
_NAMES = ("llamafactory-cli", "lmf")
_PACKAGE = str(Path(__file__).parents[1]) + os.sep


def is_command(program: str) -> bool:
    """Whether a process runs LLaMA-Factory's command, or is one of the several that it starts with torchrun."""
    return _is_first(program) or program.replace(os.sep, "/").endswith("llamafactory/launcher.py")


def _is_first(program: str) -> bool:
    return Path(program).stem in _NAMES or program.replace(os.sep, "/").endswith("llamafactory/cli.py")


def begin(argv: list[str]) -> None:
    """Called in such a process before LLaMA-Factory is imported, which takes several seconds more."""
    sys.excepthook = _told(sys.excepthook)
    names_recipe = len(argv) > 2 and argv[1] in _COMMANDS and argv[2].endswith((".yaml", ".yml"))
    if _is_first(argv[0]) and names_recipe:
        try:
            check_recipe(Path(argv[2]), argv[3:])
        except ValueError as error:
            sys.exit(f"llamafactory-cli: {argv[2]}: {error}")


def check_recipe(file: Path, overrides: list[str]) -> None:
    """See that a recipe can be read, and if it is for our templates, that its keys, values and data sets can be right.

    Raises:
        ValueError: saying what is wrong.
    """
    if not file.is_file():
        others = [each.name for each in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise ValueError(f"there is no such file{meant(file.name, others)}")
    if wrong := [word for word in overrides if "=" not in word]:
        raise ValueError(f"{wrong[0]} is no override; write key=value, such as num_train_epochs=3")
    keys = read_recipe(file, overrides)
    check_template(keys.get("template"))
    if is_ours(keys.get("template")):
        check_given(keys)
        check_datasets(
            keys.get("dataset_dir", "data"), keys.get("dataset"), keys.get("eval_dataset"), must_be_there=True
        )


def _told(stock: Callable) -> Callable:
    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = None if os.environ.get("LLAMAFACTORY_VERBOSITY") == "DEBUG" else for_a_person(error, trace)
        if text is None:
            stock(kind, error, trace)
        else:
            print(f"llamafactory-cli: {text}", file=sys.stderr)

    return tell


def for_a_person(error: BaseException, trace: TracebackType | None) -> str | None:
    """What to say of an error that a person can mend: one that our own code has raised, or a package that is missing.

    None for others.
    """
    if isinstance(error, ImportError) and "pip install" in str(error):
        return str(error).strip()
    if isinstance(error, subprocess.CalledProcessError):
        return f"a process of the run ended with status {error.returncode}; its error stands above"
    if not isinstance(error, ValueError | OSError):
        return None
    frames = list(traceback.walk_tb(trace))
    own = type(error).__module__.startswith("llamafactory_video.")
    if not own and not (frames and frames[-1][0].f_code.co_filename.startswith(_PACKAGE)):
        return None
    # torch puts the traceback of a worker that reads clips into the text of its error.
    name = f"{type(error).__module__}.{type(error).__qualname__}: "
    return str(error).rpartition(name)[2].strip() if "Original Traceback" in str(error) else str(error)
