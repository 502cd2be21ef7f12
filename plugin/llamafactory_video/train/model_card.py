"""A model's README.md: how it is asked, and the run that made it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..model.asking import how_to_ask
from .run_record import FILE, write_whole

_GENERATED = "This model card has been generated automatically"
_BEGIN, _END = "<!-- llamafactory-video: run -->", "<!-- llamafactory-video: end of run -->"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())

    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def model_card_section(record: dict[str, Any]) -> str:
    """The record as Markdown for a person to read; `run.json` has all of it."""
    parts = ["## How this model was made", f"All values are in [`{FILE}`]({FILE})."]
    run = [("started", record["started"]), ("finished", record["finished"] or "no"), ("steps", record["steps"])]
    run += [(f"resumed from step {again['from_step']}", _resumed(again)) for again in record.get("history", [])]
    run += [
        (f"exported {one['time']}", f"{', '.join(one['of'])}, in {one['dtype']}") for one in record.get("exports", [])
    ]
    if "git" in record:
        run.append(("git", record["git"]["revision"] + (" with changes" if record["git"]["dirty"] else "")))
    machine = record["machine"]
    devices = ", ".join(f"{count} x {name} a node" for name, count in machine["gpus"].items()) or machine["device"]
    run.append(("machine", f"{devices}; processes: {machine['processes']}, nodes: {machine['nodes']}"))
    run.append(("seed", record["seeds"]["seed"]))
    parts.append(_table(("run", ""), run))

    text = yaml.safe_dump(record["recipe"], allow_unicode=True, sort_keys=False, width=1000)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    parts += ["### Recipe", "What differs from the defaults:", f"{fence}yaml\n{text}{fence}"]

    modules = [(name, part["parameters"], part["trained"]) for name, part in record["model"]["modules"].items()]
    parts += ["### Parameters", _table(("module", "parameters", "trained"), modules)]

    rows = [
        (name, *(part.get(key) or 0 for key in ("records", "clips", "pictures")), part.get("sha256", part.get("why")))
        for name, part in record["data"].items()
    ]
    parts += ["### Data", _table(("data set", "records", "clips", "pictures", "sha256 of the records"), rows)]

    sampling = [
        (f"{kind}: {key}", value)
        for kind, values in record.get("sampling", {}).items()
        for key, value in values.items()
        if value is not None
    ]
    if sampling:
        parts += ["### Sampling", _table(("sampling", ""), sampling)]
    if record["results"]:
        parts += ["### Results", _table(("result", ""), list(record["results"].items()))]
    parts += ["### Versions", _table(("package", "version"), list(record["versions"].items()))]
    return "\n\n".join(parts) + "\n"


def _resumed(again: dict[str, Any]) -> str:
    changed = (f"{key}: {change['before']} -> {change['now']}" for key, change in again["changed"].items())
    return f"{again['time']}; changed: {'; '.join(changed) or 'nothing'}"


def add_to_model_card(readme: Path, record: dict[str, Any]) -> None:
    """Put the record, and how the model is asked, into a model card in place of earlier ones, or behind all that it says.

    A card that transformers has filled in, which says "More information needed" and links folders, gives way to one of ours.
    """
    try:
        card = readme.read_text(encoding="utf-8")
    except FileNotFoundError:
        card = ""
    folder = readme.parent
    if _GENERATED in card:
        about = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
        card = _head(folder.resolve().name, record, record["recipe"].get("model_name_or_path", ""), about)
    # The card's own text may hold no marks of ours; the record's may, inside its recipe.
    section = how_to_ask(folder, folder.name) + "\n" + model_card_section(record)
    section = section.replace(_BEGIN, "").replace(_END, "").lstrip("\n")
    begin, end = card.find(_BEGIN), card.rfind(_END)
    if 0 <= begin < end:
        before, after = card[:begin], card[end + len(_END) :]
    else:
        before, after = card.rstrip() + "\n\n" if card.strip() else "", "\n"
    write_whole(readme, f"{before}{_BEGIN}\n{section}{_END}{after}")


def write_export_card(
    folder: Path, record: dict[str, Any] | None, base: str, sources: Sequence[str], hub: str | None
) -> None:
    """Write the card of an exported model.

    Args:
        record: of the run that made it, if it is known.
        base: the model that adapters were merged into.
        sources: these adapters, or the model itself.
        hub: the name that it will have on a hub.
    """
    parts = [
        _head(hub or folder.resolve().name, record, base, {"tags": ["llama-factory"]}),
        how_to_ask(folder, hub or folder.name),
    ]
    if record is None:
        parts.append(f"## How this model was made\n\nOf {', '.join(sources)}, which hold no record of a run.\n")
    else:
        parts.append(f"{_BEGIN}\n{model_card_section(record)}{_END}\n")
    write_whole(folder / "README.md", "\n".join(parts))


def _head(name: str, record: dict[str, Any] | None, base: str, about: dict[str, Any]) -> str:
    """What a hub reads of a card, and its first sentence.

    Args:
        about: what is known to the hub already.
    """
    left_out = ("model-index", "base_model")  # which is empty, and may be a folder
    told = {"library_name": "transformers"} | {key: value for key, value in about.items() if key not in left_out}
    told["pipeline_tag"] = "video-text-to-text"
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    if on_hub:
        told["base_model"] = base
    told["tags"] = [*told.get("tags", []), "llamafactory-video"]
    said = f"Made of {f'[{base}](https://huggingface.co/{base})' if on_hub else f'`{base}`'}"
    if record is not None and (data := record["recipe"].get("dataset")):
        count = sum(part.get("records") or 0 for key, part in record["data"].items() if key.startswith("train"))
        said += f", trained on {f'{count:,} records of ' if count else ''}`{data}`"
    text = yaml.safe_dump(told, allow_unicode=True, sort_keys=False)
    return f"---\n{text}---\n\n# {name}\n\n{said}.\n"
