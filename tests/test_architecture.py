"""The rooms of the package, and which way its imports may point."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import llamafactory_video
import pytest

ROOT = Path(llamafactory_video.__file__).parent
# room -> the rooms below it that it may import
ROOMS = {
    "media": set(),
    "digest": set(),
    "words": set(),
    "families": set(),
    "records": {"media", "digest", "words"},
    "evaluate": {"records"},
    "video": {"media", "digest"},
    "prompt": {"media", "families", "records", "video"},
    "model": {"media", "families", "records", "video", "prompt"},
    "train": {"media", "families", "records", "prompt", "model", "evaluate"},
    "serve": {"media", "words", "records", "video", "prompt", "model"},
    "lmms": {"media", "records", "model"},
    "host": {"media", "words", "families", "records", "evaluate", "video", "prompt", "train", "model", "serve", ""},
    "tools": {"media", "records", "video", "prompt", "model", "host", "demo", "evaluate"},
    "demo": set(),
    "": {"host", "model"},
}
# room -> libraries that it must not import
FOREIGN = {
    "media": {"torch", "transformers", "llamafactory", "datasets", "av"},
    "digest": {"torch", "transformers", "llamafactory", "datasets", "av"},
    "words": {"torch", "transformers", "llamafactory", "datasets", "av"},
    "families": {"torch", "transformers", "llamafactory", "datasets", "av"},
    "records": {"torch", "transformers", "llamafactory", "av"},
    "evaluate": {"torch", "transformers", "llamafactory", "datasets", "av"},
    "video": {"transformers", "llamafactory", "datasets"},
    "prompt": {"transformers", "llamafactory"},
    "train": {"llamafactory"},
    "model": {"llamafactory"},
    "serve": {"llamafactory", "transformers"},
    "lmms": {"llamafactory", "transformers"},
    "tools": {"llamafactory", "transformers"},
}
FILES = sorted(ROOT.rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Modules that a file imports, at its top or in functions, relative ones with their whole name."""
    package = file.relative_to(ROOT.parent).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = ROOT.parent.joinpath(*module.split("."), alias.name)
                yield f"{module}.{alias.name}" if inner.with_suffix(".py").is_file() else module


def room(module: str) -> str:
    parts = module.split(".")[1:]
    return parts[0] if parts and parts[0] in ROOMS else ""


def name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_point_down(file):
    own = room(name(file))
    for module in imports(file):
        top = module.partition(".")[0]
        if top == "llamafactory_video":
            assert room(module) in ROOMS[own] | {own}, f"{name(file)} imports {module}"
        assert top not in FOREIGN.get(own, ()), f"{name(file)} imports {module}"


def test_there_are_no_circles():
    graph = {
        name(file): {module for module in imports(file) if module.startswith("llamafactory_video.")} for file in FILES
    }
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, naming a circle
    assert set(graph) <= set(order)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_files_are_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400
