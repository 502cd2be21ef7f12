"""The section on a run in its model's README.md."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .run_record import FILE, write_whole

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
    """Put the record into a model card in place of an earlier one, or behind all that it says."""
    try:
        card = readme.read_text(encoding="utf-8")
    except FileNotFoundError:
        card = ""
    # The card's own text may hold no marks of ours; the record's may, inside its recipe.
    section = model_card_section(record).replace(_BEGIN, "").replace(_END, "")
    begin, end = card.find(_BEGIN), card.rfind(_END)
    if 0 <= begin < end:
        before, after = card[:begin], card[end + len(_END) :]
    else:
        before, after = card.rstrip() + "\n\n" if card.strip() else "", "\n"
    write_whole(readme, f"{before}{_BEGIN}\n{section}{_END}{after}")
