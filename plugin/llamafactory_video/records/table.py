"""Annotation files -> a memory-mapped table of checked conversations.

Records are read as a stream and written to an Arrow file in the Hugging Face datasets cache, keyed by the
annotation files' paths, sizes and times and by the settings. 200,000 records or a million take the same memory, and
the processes of a run share it.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from tqdm import tqdm

from .. import media
from ..digest import code_digest
from ..media import ASSISTANT, FUNCTION, Clip, Conversation, is_address
from . import clips, files, json_text, parse
from .clips import Problem, RecordKeys, decode_clip
from .files import MediaFinder, annotation_files, read_records
from .json_text import read_json
from .parse import is_text_items, parse_record
from .report import DatasetError, RawRecord, WrongRecords, report_wrong

_PROGRAM = (__name__, *(module.__name__ for module in (media, clips, files, json_text, parse)))
_ROWS = 5000  # rows written at a time


@dataclass(frozen=True)
class Layout:
    """How conversations lie in the columns of a table.

    Attributes:
        features: the columns.
        to_row, from_row: a conversation as a row of them, and back.
        videos, images: the columns of clips, in texts that `decode_clip` reads, and of paths of pictures.
    """

    features: datasets.Features
    to_row: Callable[[Conversation], dict[str, Any]]
    from_row: Callable[[dict[str, Any]], Conversation]
    videos: str
    images: str


class Records(Sequence[Conversation]):
    """The conversations of a table."""

    def __init__(self, table: datasets.Dataset, layout: Layout) -> None:
        self.table, self.layout = table.with_format(None), layout

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Conversation:
        return self.layout.from_row(self.table[number])

    def __iter__(self) -> Iterator[Conversation]:
        return map(self.layout.from_row, self.table)

    def select(self, numbers: Iterable[int]) -> "Records":
        """Those with these numbers, in this order."""
        return Records(self.table.select(numbers), self.layout)


def _cache_key(files: list[Path], settings: tuple) -> str:
    # With another program, records may come out otherwise: what an earlier one made of them is not used.
    facts = [
        code_digest(*_PROGRAM),
        repr(settings),
    ]
    for file in files:
        stat = file.stat()
        facts.append(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def load_conversations(
    path: Path,
    media_dir: str,
    layout: Layout,
    keys: RecordKeys = RecordKeys(),  # noqa: B008 - frozen
    indent: int | None = None,
    most_wrong: float = 0.0,
    name: str | None = None,
    report_dir: Path | None = None,
    cache_dir: str | None = None,
    remote: bool = False,
    refresh: bool = False,
    log: Callable[[str], None] = print,
    progress: bool = True,
) -> datasets.Dataset:
    """Read, check and store the records of a file or a folder.

    Args:
        path: a .json or .jsonl file, or a folder of them.
        media_dir: folder to which paths in records are relative.
        layout: of the table.
        keys: names of the records' fields.
        indent: for answers that are JSON values: spaces a level, or None for one line.
        most_wrong: the greatest share of wrong records that are left out, with a list, instead of stopping.
        name: of the data set; names the report.
        report_dir: where the list of wrong records is written when there are any.
        cache_dir: where the Arrow file is kept; the datasets cache by default.
        remote: whether records may give addresses in place of paths.
        refresh: read the files again even if they are in the cache.
        log: takes a line for the person who runs this.
        progress: show a progress bar.

    Returns:
        A memory-mapped dataset.

    Raises:
        DatasetError: listing every wrong record, unless they are left out.
    """
    files = annotation_files(path)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "llamafactory_video"
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / f"{_cache_key(files, (os.path.abspath(media_dir), keys, indent, remote, layout.features))}.arrow"
    notes = stored.with_suffix(".json")  # what was wrong when it was stored: said each time
    if not refresh and stored.is_file() and notes.is_file():
        dataset, known = datasets.Dataset.from_file(str(stored)), json.loads(notes.read_text(encoding="utf-8"))
        # A clip can vanish while its annotation stays: ask again, by folder, which takes a moment.
        if not _missing_media(dataset, layout, MediaFinder("")):
            wrong = WrongRecords(**known["wrong"])
            report_wrong(wrong, path, known["total"], most_wrong, name, report_dir, log)
            return dataset
    wrong = WrongRecords()
    total = 0
    _remove_leftovers(folder)
    # A name of its own, even beside a process of the same number on another node.
    handle, partial = tempfile.mkstemp(dir=folder, prefix=stored.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file, pa.ipc.new_stream(file, layout.features.arrow_schema) as writer:
            rows: list[dict[str, Any]] = []
            for record, conversation, problems in _checked(
                files, MediaFinder(media_dir, remote), keys, indent, progress
            ):
                total += 1
                if problems:
                    wrong.add(record, problems)
                else:
                    wrong.note(record, conversation.notes)
                    rows.append(layout.to_row(replace(conversation, source=record.location)))
                if len(rows) >= _ROWS:
                    writer.write(pa.RecordBatch.from_pylist(rows, schema=layout.features.arrow_schema))
                    rows.clear()
            writer.write(pa.RecordBatch.from_pylist(rows, schema=layout.features.arrow_schema))
        report_wrong(wrong, path, total, most_wrong, name, report_dir, log)
        notes.write_text(json.dumps({"wrong": asdict(wrong), "total": total}, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, stored)
    finally:
        Path(partial).unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(stored))


def check_rows(
    rows: datasets.Dataset,
    media_dir: str,
    layout: Layout,
    keys: RecordKeys,
    indent: int | None,
    most_wrong: float,
    name: str,
    report_dir: Path | None,
    log: Callable[[str], None],
    remote: bool = False,
) -> datasets.Dataset:
    """Check records that come from a hub, as JSON texts in a column `_record`; see `load_conversations`."""
    wrong, good, find = WrongRecords(), [], MediaFinder(media_dir, remote)
    for number, row in enumerate(rows, start=1):
        value, wrong_json = read_json(row["_record"])
        record = RawRecord(Path(name), number, 0, value)
        conversation, problems = parse_record(value, find, keys, indent)
        problems += [Problem("record", text, "one JSON object is needed") for text in wrong_json]
        if merged := _merged_objects(value, keys):
            raise DatasetError(
                f"{name}: {merged} holds objects. A hub's table gives those of all records the same keys and fills the "
                "rest with null, so they are not what was written. Write them as JSON text, or download the files and "
                "register them with `file_name`"
            )
        if problems:
            wrong.add(record, problems)
        else:
            wrong.note(record, conversation.notes)
            good.append(layout.to_row(replace(conversation, source=record.location)))
    report_wrong(wrong, Path(name), len(rows), most_wrong, name, report_dir, log)
    return datasets.Dataset.from_list(good, features=layout.features)


def _merged_objects(record: Any, keys: RecordKeys) -> str | None:
    """The field of a hub's record in which an answer or a tool is an object."""

    def holds_object(value: Any) -> bool:
        return isinstance(value, dict) or (isinstance(value, list) and any(map(holds_object, value)))

    for name in keys.tools:
        if holds_object(record.get(name)):
            return name
    roles = dict(keys.roles)
    for name in keys.messages:
        turns = record.get(name)
        for turn in turns if isinstance(turns, list) else ():
            if not isinstance(turn, dict):
                continue  # wrong in another way, which the record's own check says
            role = next((roles.get(turn[key]) for key in keys.role if isinstance(turn.get(key), str)), None)
            if role in (ASSISTANT, FUNCTION):
                for key in keys.content:
                    value = turn.get(key)
                    if holds_object(value) and not is_text_items(value):
                        return f"{name}, {key} of an answer,"
    return None


def _remove_leftovers(folder: Path) -> None:
    """Remove partial files of killed runs, a day old: no other process can still be writing them."""
    for file in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < time.time() - 86400:
                file.unlink()


def _checked(
    files: list[Path], find: MediaFinder, keys: RecordKeys, indent: int | None, progress: bool
) -> Iterator[tuple[RawRecord, Conversation, list[Problem]]]:
    with tqdm(unit=" records", desc="Reading annotations", disable=not progress, mininterval=1) as bar:
        for file in files:
            for record in read_records(file):
                bar.update()
                error = record.error
                try:
                    if not error:
                        yield record, *parse_record(record.value, find, keys, indent)
                except RecursionError:
                    error = "nested too deeply"
                if error:
                    yield record, Conversation([]), [Problem("record", error, "one JSON object is needed")]


def _missing_media(dataset: datasets.Dataset, layout: Layout, find: MediaFinder) -> bool:
    for column in (layout.videos, layout.images):
        for batch in dataset.data.column(column).chunks:
            for text in batch.flatten().unique().to_pylist():
                clip = decode_clip(text) if column == layout.videos else Clip(text)
                if any(not is_address(path) and find(path) is None for path in clip.frames or (clip.path,)):
                    return True
    return False
