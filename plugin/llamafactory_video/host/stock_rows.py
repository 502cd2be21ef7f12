"""Data sets of LLaMA-Factory's own formats under our templates: their rows, checked as our records are, in our columns."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from ..media import ASSISTANT, FUNCTION, SYSTEM, TOOL, USER, Conversation
from ..records.clips import Problem, RecordKeys
from ..records.files import MediaFinder
from ..records.parse import parse_record
from ..records.report import DatasetError, RawRecord, WrongRecords, report_wrong
from .rows import FEATURES, to_row

_ROLES = tuple((role, role) for role in (USER, ASSISTANT, SYSTEM, TOOL, FUNCTION))  # as its converters name them


def _keys(attr: Any) -> RecordKeys:
    """The fields of a row, by the names that its data set's records have for them."""
    messages = attr.messages if attr.formatting != "alpaca" else "turns"
    names = {
        "messages": messages,
        "videos": attr.videos,
        "images": attr.images,
        "system": attr.system,
        "tools": attr.tools,
    }
    given = {field: (name,) for field, name in names.items() if name}
    return replace(RecordKeys(role=("role",), content=("content",), roles=_ROLES), **given)


def check_stock_rows(
    rows: datasets.Dataset,
    attr: Any,
    path: Path,
    media_dir: str,
    most_wrong: float,
    remote: bool,
    name: str,
    report_dir: Path | None,
    log: Callable[[str], None],
) -> datasets.Dataset:
    """The rows that LLaMA-Factory's converter made, all that it was given, as a table of our columns.

    Those that LLaMA-Factory leaves out are left out, with a word: turns that do not alternate, no answer, no text.

    Args:
        attr: the data set in dataset_info.json.
        path: its file, or its name on a hub.
        media_dir: folder to which paths in records are relative.
        name: of the data set; names the report.

    Raises:
        DatasetError: listing every record that is wrong in another way, unless they are left out.
    """
    keys, find = _keys(attr), _Finder(media_dir, remote)
    pictures = _pictures_inside(rows)
    wrong, good, kept = WrongRecords(), [], []
    texts = rows if pictures is None else rows.remove_columns("_images")
    for number, row in enumerate(tqdm(texts, unit=" records", desc=f"Checking {name}", mininterval=1)):
        record = RawRecord(path, number + 1, 0)
        if reason := _left_out(row):
            wrong.note(record, [f"a record {reason} is left out, as LLaMA-Factory does"])
            continue
        if pictures is not None:
            row["_images"] = [_Inside(i) for i in range(pictures[number])]
        conversation, problems = _parse(row, attr, keys, find)
        if problems:
            wrong.add(record, problems)
        else:
            wrong.note(record, conversation.notes)
            kept.append(number)
            good.append(to_row(replace(conversation, source=record.location)))
    report_wrong(wrong, path, len(rows), most_wrong, name, report_dir, log)
    if not good:
        raise DatasetError(f"{path}: all of its {len(rows)} records are left out, so nothing is left to train on")
    table = datasets.Dataset.from_list(good, features=FEATURES)
    if pictures is None:
        return table
    stored = rows.select(kept).select_columns("_images")
    return datasets.concatenate_datasets([table.remove_columns("_images"), stored], axis=1)


class _Inside(str):
    """Stands for a picture that lies in a hub's table itself, while its record is checked."""

    def __new__(cls, number: int) -> "_Inside":
        return super().__new__(cls, f"picture {number + 1}")


class _Finder(MediaFinder):
    def __call__(self, path: str) -> str | None:
        return path if isinstance(path, _Inside) else super().__call__(path)


def _pictures_inside(rows: datasets.Dataset) -> list[int] | None:
    """How many pictures each row of a hub's table holds, which are not read for that; None: they are files, or there are none."""
    kind = rows.data.schema.field("_images").type
    held = getattr(kind, "value_type", kind)
    if pa.types.is_string(held) or pa.types.is_large_string(held) or pa.types.is_null(held):
        return None
    lengths = rows.with_format("arrow").data.column("_images")
    return [0 if count is None else count for count in pc.list_value_length(lengths).to_pylist()]


def _left_out(row: dict[str, Any]) -> str | None:
    """Why LLaMA-Factory trains on no such row."""
    turns, answers = row["_prompt"] or (), row["_response"] or ()
    if not turns and not answers:
        return "whose turns do not go user, assistant, user, assistant"
    if len(answers) > 1:
        return "with more than one answer, as in feedback data (`kto_tag`),"
    if not answers:
        return "without an answer"
    if len(turns) % 2 != 1:
        return "whose turns do not go user, assistant, user, assistant"
    if any(not (turn["content"] or "").strip() for turn in (*turns, *answers)):
        return "with an empty text"
    return None


def _parse(row: dict[str, Any], attr: Any, keys: RecordKeys, find: MediaFinder) -> tuple[Conversation, list[Problem]]:
    """A row as a checked conversation, and what is wrong with it; see `parse_record`."""
    clips = [
        {name: value for name, value in video.items() if value is not None} if isinstance(video, dict) else video
        for video in row["_videos"] or ()
    ]
    record = {
        keys.messages[0]: [*row["_prompt"], *row["_response"]],
        keys.videos[0]: clips,
        keys.images[0]: row["_images"],
        keys.system[0]: row["_system"],
        keys.tools[0]: row["_tools"],
    }
    conversation, problems = parse_record({name: value for name, value in record.items() if value}, find, keys)
    for kind, column, field in (("videos", attr.videos, keys.videos[0]), ("images", attr.images, keys.images[0])):
        if column is None:
            advice = f'name the field that holds them in dataset_info.json: "columns": {{"{kind}": …}}'
            problems = [replace(each, expected=advice) if each.field == field else each for each in problems]
    return conversation, problems
