"""Annotation files -> an Arrow table of checked conversations, and from there token ids, one record at a time.

Records are read as a stream and written to an Arrow file in the Hugging Face datasets cache, keyed by the
annotation files' paths, sizes and times and by the settings. The table is memory-mapped: 200,000 records or a
million take the same memory, and the processes of a run share it. Nothing is expanded ahead: token ids are made
when a record is asked for (`RecordEncoder`), so no disk or memory goes to visual tokens.
"""

import codecs
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow as pa
from jinja2 import TemplateError as JinjaError
from tqdm import tqdm

from ..model.template import IGNORE_INDEX, TemplateError, encode_conversation
from ..video.cache import code_digest
from ..video.clip import ClipReader, as_clip, plan_digest, usable_cores
from ..video.probe import ClipError
from ..video.sampling import SHRINK_STAGES, FramePlan, SamplingError, most_tokens, shrink
from .conversation import (
    ASSISTANT,
    FUNCTION,
    Clip,
    Conversation,
    Problem,
    RecordDecoder,
    RecordKeys,
    decode_clip,
    is_text_items,
    parse_record,
    read_json,
)

Result = TypeVar("Result")

# LLaMA-Factory's columns of an aligned dataset, so that ours can be mixed with others, and where a record came from.
FEATURES = datasets.Features(
    {
        "_prompt": [{"content": datasets.Value("string"), "role": datasets.Value("string")}],
        "_response": [{"content": datasets.Value("string"), "role": datasets.Value("string")}],
        "_system": datasets.Value("string"),
        "_tools": datasets.Value("string"),
        "_images": [datasets.Value("string")],
        "_videos": [datasets.Value("string")],
        "_audios": [datasets.Value("string")],
        "_source": datasets.Value("string"),
    }
)
_CHUNK = 4 << 20  # characters read from a file at a time
_ROWS = 5000  # rows written at a time
_FEW = 64  # records that are measured without other processes
_SHRINK_STEPS = 64  # sizes of a clip that are told apart when it is made smaller
_TURN_TOKENS = 16  # more than the layout around a turn takes
_SHOWN = 50  # problems printed; the report file has all


class DatasetError(ValueError):
    """Annotation files with wrong records; the message lists them.

    Attributes:
        wrong: how many records are wrong.
        lengths: tokens, and visual ones among them, of a record that is too long.
    """

    def __init__(self, message: str, wrong: int = 1, lengths: tuple[int, int] = (0, 0)) -> None:
        super().__init__(message)
        self.wrong, self.lengths = wrong, lengths


@dataclass(frozen=True)
class RawRecord:
    """A record as it stands in its file: `value` if it could be read, else `error`."""

    file: Path
    number: int
    line: int
    value: Any = None
    error: str | None = None
    is_last: bool = False  # nothing after it can be read

    @property
    def place(self) -> str:
        return f"{self.file}, record {self.number}" + (f" (line {self.line})" if self.line else "")


@dataclass
class WrongRecords:
    """What is wrong with a data set, for a person to read."""

    records: int = 0
    lines: list[str] = field(default_factory=list)
    cut_off: bool = False  # a file could not be read to its end
    notes: dict[str, list] = field(default_factory=dict)  # what was read otherwise: how often, and where first

    def add(self, record: RawRecord, problems: list[Problem]) -> None:
        self.records += 1
        self.lines.extend(f"{record.place}: {problem}" for problem in problems)
        self.cut_off |= record.is_last

    def note(self, record: RawRecord, notes: list[str]) -> None:
        for note in notes:
            self.notes.setdefault(note, [0, record.place])[0] += 1

    def text(self, report: Path | None) -> str:
        shown = "\n".join(f"  {line}" for line in self.lines[:_SHOWN])
        more = len(self.lines) - _SHOWN
        rest = f"\n  … and {more} more" if more > 0 else ""
        return f"{shown}{rest}" + (f"\nAll of them are listed in {report}." if report else "")


def annotation_files(path: Path) -> list[Path]:
    """The JSON and JSONL files at a path: itself, or those of a folder in order of their names.

    Raises:
        DatasetError: if there are none.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
        if not files:
            raise DatasetError(f"{path}: no .json or .jsonl file in this folder")
        return files
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; check `file_name` in dataset_info.json and `dataset_dir`")
    return [path]


def _read_text(file: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)


def read_records(file: Path) -> Iterator[RawRecord]:
    """The records of one file, in order: a JSON array, or one JSON value on each line.

    A record that is wrong in itself is one wrong record. Where the rest of a file cannot be read, the last record
    says so.
    """
    try:
        yield from _read_array(file) if _first_character(file) == "[" else _read_lines(file)
    except UnicodeDecodeError as error:
        yield RawRecord(file, 0, 0, error=f"not UTF-8 ({error.reason}); save the file as UTF-8", is_last=True)


def _first_character(file: Path) -> str:
    with file.open("rb") as stream:
        return stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1].decode("ascii", "replace")


def _read_lines(file: Path) -> Iterator[RawRecord]:
    number = 0
    # Lines end at \n alone: str.splitlines would also split inside texts, at U+2028 and others.
    with file.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            if not (raw := raw.removeprefix(codecs.BOM_UTF8).strip() if line == 1 else raw.strip()):
                continue
            number += 1
            try:
                value, problems = read_json(raw.decode())
            except UnicodeDecodeError as error:
                value, problems = None, [f"not UTF-8 ({error.reason}); save it as UTF-8"]
            is_last = bool(problems) and number == 1 and file.suffix == ".json"
            if is_last:
                problems.append("a .json file holds an array of records, or one record on each line")
            yield RawRecord(file, number, line, value, "; ".join(problems) or None, is_last)
            if is_last:
                return


def _read_array(file: Path) -> Iterator[RawRecord]:
    chunks = _read_text(file)
    buffer, position, line, number, ended = "", 0, 1, 0, False

    def refill() -> None:
        """Drop what was read, and read as much again as is left, so that a long record costs linear time."""
        nonlocal buffer, position, ended
        buffer, position = buffer[position:], 0
        wanted = 2 * len(buffer) + 1
        while not ended and len(buffer) < wanted:
            text = next(chunks, None)
            ended = text is None
            buffer += text or ""

    def skip(characters: str) -> str:
        """Step over blanks and those characters; the next character, or "" at the end of the file."""
        nonlocal position, line
        while True:
            while position < len(buffer) and buffer[position] in characters:
                line += buffer[position] == "\n"
                position += 1
            if position < len(buffer) or ended:
                return buffer[position : position + 1]
            refill()

    def unreadable(number: int, line: int, error: str) -> RawRecord:
        return RawRecord(file, number, line, error=f"{error}; nothing after it was read", is_last=True)

    decoder = RecordDecoder()
    blanks = " \t\r\n"
    skip(blanks + codecs.BOM_UTF8.decode())
    position += 1  # the opening bracket
    following = skip(blanks)
    while following not in ("]", ""):
        number += 1
        while True:
            decoder.problems = []
            try:
                value, end = decoder.raw_decode(buffer, position)
                # A number or a word at the end of the buffer may go on in the next chunk.
                if end < len(buffer) or ended:
                    break
            except RecursionError:
                yield unreadable(number, line, "nested too deeply")
                return
            except json.JSONDecodeError as error:
                if ended:
                    at = line + buffer.count("\n", position, error.pos)
                    yield unreadable(number, line, f"not JSON: {error.msg} (line {at})")
                    return
            refill()
        text = buffer[position:end]
        problems = decoder.problems
        if not problems and "\\u" in text:
            problems = read_json(text)[1]
        yield RawRecord(file, number, line, value, "; ".join(problems) or None)
        line += text.count("\n")
        position = end
        following = skip(blanks)
        if following == ",":
            position += 1
            following = skip(blanks)
            if following == "]":
                yield unreadable(number + 1, line, "a comma before the closing bracket")
                return
        elif following != "]":
            found = f"{following!r}" if following else "the end of the file"
            yield unreadable(number + 1, line, f"expected , or ] and found {found}")
            return
    if following == "":
        yield unreadable(number + 1, line, "the array does not end: ] is missing; the file may be cut off")
        return
    position += 1
    if rest := skip(blanks):
        yield unreadable(number + 1, line, f"{rest!r} after the end of the array")


class MediaFinder:
    """Finds the files that records name, below `media_dir` first, then as the path stands.

    Each folder is listed once: asking a network file system for every clip of 200,000 would take minutes.
    """

    def __init__(self, media_dir: str) -> None:
        self.media_dir = media_dir
        self._listings: dict[str, frozenset[str]] = {}

    def _is_file(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._listings:
            try:
                with os.scandir(folder or ".") as entries:
                    self._listings[folder] = frozenset(entry.name for entry in entries if entry.is_file())
            except OSError:
                self._listings[folder] = frozenset()
        return name in self._listings[folder]

    def __call__(self, path: str) -> str | None:
        return next((p for p in (os.path.join(self.media_dir, path), path) if self._is_file(p)), None)


def to_row(conversation: Conversation, source: str) -> dict[str, Any]:
    """A conversation as a row of `FEATURES`."""
    messages = [{"content": text, "role": role} for role, text in conversation.messages]
    return {
        "_prompt": messages[:-1],
        "_response": messages[-1:],
        "_system": conversation.system,
        "_tools": conversation.tools,
        "_images": conversation.images or None,
        "_videos": [clip.encode() for clip in conversation.videos] or None,
        "_audios": None,
        "_source": source,
    }


def _cache_key(files: list[Path], settings: tuple) -> str:
    # With another program, records may come out otherwise: what an earlier one made of them is not used.
    facts = [code_digest(__name__, parse_record.__module__), repr(settings)]
    for file in files:
        stat = file.stat()
        facts.append(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def load_conversations(
    path: Path,
    media_dir: str,
    keys: RecordKeys = RecordKeys(),  # noqa: B008 - frozen
    indent: int | None = None,
    skip_wrong: bool = False,
    name: str | None = None,
    report_dir: Path | None = None,
    cache_dir: str | None = None,
    refresh: bool = False,
    log: Callable[[str], None] = print,
    progress: bool = True,
) -> datasets.Dataset:
    """Read, check and store the records of a file or a folder.

    Args:
        path: a .json or .jsonl file, or a folder of them.
        media_dir: folder to which paths in records are relative.
        keys: names of the records' fields.
        indent: for answers that are JSON values: spaces a level, or None for one line.
        skip_wrong: leave wrong records out and say so, instead of stopping.
        name: of the data set; names the report.
        report_dir: where the list of wrong records is written when there are any.
        cache_dir: where the Arrow file is kept; the datasets cache by default.
        refresh: read the files again even if they are in the cache.
        log: takes a line for the person who runs this.
        progress: show a progress bar.

    Returns:
        A memory-mapped dataset with the columns of `FEATURES`.

    Raises:
        DatasetError: listing every wrong record, unless `skip_wrong`.
    """
    files = annotation_files(path)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "llamafactory_video"
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / f"{_cache_key(files, (os.path.abspath(media_dir), keys, indent))}.arrow"
    notes = stored.with_suffix(".json")  # what was wrong when it was stored: said each time
    if not refresh and stored.is_file() and notes.is_file():
        dataset, known = datasets.Dataset.from_file(str(stored)), json.loads(notes.read_text(encoding="utf-8"))
        # A clip can vanish while its annotation stays: ask again, by folder, which takes a moment.
        if not _missing_media(dataset, MediaFinder("")):
            wrong = WrongRecords(**known["wrong"])
            _report(wrong, path, known["total"], skip_wrong, name, report_dir, log)
            return dataset
    wrong = WrongRecords()
    total = 0
    _remove_leftovers(folder)
    # A name of its own, even beside a process of the same number on another node.
    handle, partial = tempfile.mkstemp(dir=folder, prefix=stored.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file, pa.ipc.new_stream(file, FEATURES.arrow_schema) as writer:
            rows: list[dict[str, Any]] = []
            for record, conversation, problems in _checked(files, MediaFinder(media_dir), keys, indent, progress):
                total += 1
                if problems:
                    wrong.add(record, problems)
                else:
                    wrong.note(record, conversation.notes)
                    rows.append(to_row(conversation, record.place))
                if len(rows) >= _ROWS:
                    writer.write(pa.RecordBatch.from_pylist(rows, schema=FEATURES.arrow_schema))
                    rows.clear()
            writer.write(pa.RecordBatch.from_pylist(rows, schema=FEATURES.arrow_schema))
        _report(wrong, path, total, skip_wrong, name, report_dir, log)
        notes.write_text(json.dumps({"wrong": asdict(wrong), "total": total}, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, stored)
    finally:
        Path(partial).unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(stored))


def check_rows(
    rows: datasets.Dataset,
    media_dir: str,
    keys: RecordKeys,
    indent: int | None,
    skip_wrong: bool,
    name: str,
    report_dir: Path | None,
    log: Callable[[str], None],
) -> datasets.Dataset:
    """Check records that come from a hub, as JSON texts in a column `_record`; see `load_conversations`."""
    wrong, good, find = WrongRecords(), [], MediaFinder(media_dir)
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
            good.append(to_row(conversation, record.place))
    _report(wrong, Path(name), len(rows), skip_wrong, name, report_dir, log)
    return datasets.Dataset.from_list(good, features=FEATURES)


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


def _report(
    wrong: WrongRecords,
    path: Path,
    total: int,
    skip_wrong: bool,
    name: str | None,
    report_dir: Path | None,
    log: Callable[[str], None],
) -> None:
    if total == 0:
        raise DatasetError(f"{path}: no records in it")
    for note, (count, place) in wrong.notes.items():
        log(f"{path}: {note} ({count} times, first in {place}).")
    if not wrong.records:
        return
    report = None
    if report_dir is not None:
        report_dir.mkdir(parents=True, exist_ok=True)
        report = report_dir / f"wrong_records_{name or path.stem}.txt"
        report.write_text("\n".join(wrong.lines) + "\n", encoding="utf-8")
    left = total - wrong.records
    summary = f"{path}: {wrong.records} of {total} records are wrong"
    if skip_wrong and left and not wrong.cut_off:
        log(f"{summary} and left out, {left} remain:\n{wrong.text(report)}")
        return
    advice = "Correct them, or leave them out with `skip_wrong_records: true`."
    if wrong.cut_off:
        advice = "A file could not be read to its end, so nothing can be left out; correct it."
    raise DatasetError(f"{summary}:\n{wrong.text(report)}\n{advice}", wrong.records)


def _missing_media(dataset: datasets.Dataset, find: MediaFinder) -> bool:
    for column in ("_videos", "_images"):
        for batch in dataset.data.column(column).chunks:
            for text in batch.flatten().unique().to_pylist():
                if text.startswith("{"):
                    clip = json.loads(text)
                    paths = [clip["path"]] if "path" in clip else clip["frames"]
                else:
                    paths = [text]
                if any(find(path) is None for path in paths):
                    return True
    return False


class RecordEncoder:
    """Rows of `FEATURES` -> what LLaMA-Factory's collator takes, made when a record is asked for.

    Args:
        reader: of clips.
        cutoff_len: the most tokens that a record may have; none is cut.
        shrink: clips of a longer record lose pixels, then frames, until it fits (`sampling.shrink`).
        generation: prompts alone in `input_ids`, the last answer in `labels`.
        train_on_prompt: labels on the prompt's text too.
        last_turn_only: labels on the last answer alone (LLaMA-Factory's `mask_history`).
    """

    def __init__(
        self,
        tokenizer: Any,
        processor: Any,
        reader: ClipReader,
        cutoff_len: int,
        shrink: bool = False,
        thinking: bool = False,
        default_system: str = "",
        generation: bool = False,
        train_on_prompt: bool = False,
        last_turn_only: bool = False,
    ) -> None:
        self.tokenizer, self.processor, self.reader = tokenizer, processor, reader
        self.cutoff_len, self.shrink = cutoff_len, shrink
        self.thinking, self.default_system = thinking, default_system
        self.generation, self.train_on_prompt, self.last_turn_only = generation, train_on_prompt, last_turn_only

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """A batch of columns -> a batch of columns, as `Dataset.with_transform` wants it; see `item`."""
        names = list(rows)
        items = [self.item(dict(zip(names, values, strict=True))) for values in zip(*rows.values(), strict=True)]
        return {name: [item[name] for item in items] for name in items[0]}

    def item(self, row: dict[str, Any]) -> dict[str, Any]:
        """One record as an item of the data set: what `encode` makes, and under `show` a function that reads its clips.

        The collator calls `show`, so what asks for lengths alone decodes nothing.
        """
        sample = self.encode(row)
        return {**sample, "show": functools.partial(self.show, row, sample)}

    def show(self, row: dict[str, Any], sample: dict[str, Any] | None = None) -> dict[str, Any]:
        """One record as the collator takes it, with the frames of its clips in `videos`, as `ShownClip`.

        Args:
            sample: what `encode` made of the row.

        Raises:
            DatasetError: naming the record, if it cannot be shown or is too long.
        """
        while True:
            sample = dict(sample or self.encode(row))
            plans, _ = sample.pop("plans"), sample.pop("change")
            if not plans:
                return sample
            try:
                shown = [self.reader.show(replace(decode_clip(video), planned=None)) for video in sample["videos"]]
            except ClipError as error:
                raise DatasetError(f"{_source(row)}: {error}") from error
            if [clip.plan for clip in shown] == plans:
                return {**sample, "videos": shown}
            sample = None  # decoding has taught that a file is damaged, or another file now

    def encode(self, row: dict[str, Any]) -> dict[str, Any]:
        """One record, without decoding its clips.

        Returns:
            What the collator takes, with the clips as text in `videos`; `plans`, what is shown of them; and `change`,
            what was done to clips to make the record fit, or "".

        Raises:
            DatasetError: naming the record, if it cannot be shown or is too long.
        """
        clips, change = [as_clip(video) for video in row["_videos"] or ()], ""
        ids, labels, plans = self._encode(row, clips)
        if len(ids) > self.cutoff_len:
            lengths = len(ids), self.visual_tokens(ids)
            said = (
                f"{_source(row)}: {lengths[0]} tokens, {lengths[1]} of them visual, are more than cutoff_len "
                f"{self.cutoff_len}"
            )
            smaller = self._fit(row, clips, plans)
            if smaller is None:
                least = "; even its smallest clips do not fit" if clips else ""
                raise DatasetError(
                    f"{said}{least}; raise cutoff_len to {len(ids)}, or shorten its text", lengths=lengths
                )
            if not self.shrink:
                raise DatasetError(
                    f"{said}; raise cutoff_len to {len(ids)}, or set {_differences(clips, smaller)}", lengths=lengths
                )
            ids, labels, plans = self._encode(row, smaller)
            change = f"{said}: now {len(ids)}, with {_differences(clips, smaller)}"
            clips = smaller
        if not self.generation and self.train_on_prompt:
            pads = (self.processor.image_token_id, self.processor.video_token_id)
            labels = [IGNORE_INDEX if token in pads else token for token in ids]
            labels[0] = IGNORE_INDEX  # nothing tells it, and the loss is divided by the number of labels
        elif not self.generation and self.last_turn_only:
            last = max((i for i, label in enumerate(labels) if label == IGNORE_INDEX), default=-1)
            labels = [IGNORE_INDEX] * (last + 1) + labels[last + 1 :]
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": labels,
            "images": row["_images"],
            "videos": [
                replace(clip, planned=plan_digest(plan)).encode() for clip, plan in zip(clips, plans, strict=True)
            ]
            or None,
            "audios": None,
            "plans": plans,
            "change": change,
        }

    def visual_tokens(self, ids: list[int]) -> int:
        """How many of the tokens are visual."""
        return ids.count(self.processor.image_token_id) + ids.count(self.processor.video_token_id)

    def may_be_too_long(self, row: dict[str, Any]) -> bool:
        """Whether the record can be longer than the cutoff; no clip is looked at for that."""
        if row["_tools"] or self.default_system:
            return True
        turns = [*row["_prompt"], *row["_response"]]
        texts = [row["_system"] or "", *(turn["content"] for turn in turns)]
        most = sum(len(text.encode()) + _TURN_TOKENS for text in texts)  # a token is at least a byte
        try:
            clips = [as_clip(video) for video in row["_videos"] or ()]
            most += sum(
                most_tokens(clip.sampling(self.reader.sampling), len(clip.frames) if clip.frames else None)
                for clip in clips
            )
        except SamplingError:
            return True
        return most > self.cutoff_len or bool(row["_images"])

    def _encode(self, row: dict[str, Any], clips: list[Clip]) -> tuple[list[int], list[int], list[FramePlan]]:
        try:
            plans = [self.reader.plan(clip) for clip in clips]
            encoded = encode_conversation(
                row,
                plans,
                self.tokenizer,
                self.processor,
                self.reader.sampling,
                self.thinking,
                self.default_system,
                self.generation,
            )
            return *encoded, plans
        except (ClipError, TemplateError) as error:
            raise DatasetError(f"{_source(row)}: {error}") from error
        except (JinjaError, TypeError) as error:
            raise DatasetError(f"{_source(row)}: the model's chat template cannot write it ({error})") from error

    def _fit(self, row: dict[str, Any], clips: list[Clip], plans: list[FramePlan]) -> list[Clip] | None:
        """The clips, smaller by as little as makes the record fit; None if nothing does. All go down together."""

        def tried(stage: int, step: int) -> list[Clip] | None:
            smaller = []
            for clip, plan in zip(clips, plans, strict=True):
                settings = shrink(clip.sampling(self.reader.sampling), plan, stage, step / _SHRINK_STEPS)
                smaller.append(replace(clip, **settings))
            try:
                return smaller if len(self._encode(row, smaller)[0]) <= self.cutoff_len else None
            except DatasetError:  # so few pixels that nothing is left of a frame
                return None

        for stage in range(SHRINK_STAGES if clips else 0):
            best = tried(stage, 0)
            if best is None:
                continue
            low, high = 0, _SHRINK_STEPS
            while high - low > 1:
                middle = (low + high) // 2
                larger = tried(stage, middle)
                if larger is None:
                    high = middle
                else:
                    best, low = larger, middle
            return best
        return None

    def describe(self, sample: dict[str, Any]) -> str:
        """A sample as a person reads it, with its runs of visual tokens counted."""
        from ..model.template import IMAGE_PAD, VIDEO_PAD

        text = self.tokenizer.decode(sample["input_ids"], skip_special_tokens=False)
        for pad in (IMAGE_PAD, VIDEO_PAD):
            text = re.sub(f"({re.escape(pad)})+", lambda run, pad=pad: f"{pad}*{len(run[0]) // len(pad)}", text)
        said = [label for label in sample["labels"] if label != IGNORE_INDEX]
        answer = self.tokenizer.decode(said, skip_special_tokens=False)
        return f"{text}\nlabels ({len(said)} of {len(sample['input_ids'])} tokens):\n{answer}"


def _source(row: dict[str, Any]) -> str:
    return row.get("_source") or "a record"


def _differences(clips: list[Clip], smaller: list[Clip]) -> str:
    """The settings in which clips were made smaller, for a person."""
    told = []
    for old, new in zip(clips, smaller, strict=True):
        names = [f.name for f in fields(Clip) if getattr(old, f.name) != getattr(new, f.name)]
        told.append(f"{', '.join(f'{name} {getattr(new, name)}' for name in names)} for {old}")
    return "; ".join(told)


@dataclass(frozen=True)
class Measured:
    """A record's length in tokens, or what is wrong with it, or what was done to make it fit."""

    tokens: int = 0
    visual: int = 0
    problem: str = ""
    change: str = ""


@dataclass(frozen=True)
class Stored:
    """How many of a record's clips were decoded into the cache, and were there; what is wrong with it, or lost."""

    decoded: int = 0
    found: int = 0
    problem: str = ""
    notes: tuple[str, ...] = ()


def _measure(encoder: RecordEncoder, row: dict[str, Any]) -> Measured:
    try:
        sample = encoder.encode(row)
    except DatasetError as error:
        return Measured(*error.lengths, problem=str(error))
    ids = sample["input_ids"]
    return Measured(len(ids), encoder.visual_tokens(ids), change=sample["change"])


def _store(encoder: RecordEncoder, row: dict[str, Any]) -> Stored:
    try:
        clips = [as_clip(text) for text in encoder.encode(row)["videos"] or ()]
        decoded = [encoder.reader.store(replace(clip, planned=None)) for clip in clips]
        notes = [f"{_source(row)}: {clip}: {note}" for clip in clips if (note := encoder.reader.note(clip))]
        return Stored(sum(decoded), len(decoded) - sum(decoded), notes=tuple(notes))
    except ClipError as error:
        return Stored(problem=f"{_source(row)}: {error}")
    except DatasetError as error:
        return Stored(problem=str(error))


_work: Callable[[dict[str, Any]], Any] | None = None  # of a process of `_for_all`


def _start_work(work: Callable[[RecordEncoder, dict[str, Any]], Any], encoder: RecordEncoder) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the others
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work = functools.partial(work, encoder)


def _end_with(parent: int) -> None:
    """End this process once its parent has been killed, which tells nobody."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _do_work(row: dict[str, Any]) -> Any:
    return _work(row)


def _for_all(
    work: Callable[[RecordEncoder, dict[str, Any]], Result],
    encoder: RecordEncoder,
    dataset: datasets.Dataset,
    numbers: Sequence[int],
    workers: int | None,
    title: str,
) -> Iterator[Result]:
    """What `work` makes of the records with those numbers, in order, by several processes, with a progress bar."""
    workers = workers or usable_cores()
    parts = (dataset.select(numbers[at : at + _ROWS]) for at in range(0, len(numbers), _ROWS))
    with tqdm(total=len(numbers), unit=" records", desc=title) as bar:
        if workers < 2:
            for part in parts:
                for row in part:
                    yield work(encoder, row)
                    bar.update()
            return
        context = multiprocessing.get_context("fork")
        executor = ProcessPoolExecutor(workers, context, _start_work, (work, encoder))
        try:
            for part in parts:
                for result in executor.map(_do_work, part, chunksize=min(8, 1 + len(part) // (4 * workers))):
                    yield result
                    bar.update()
            executor.shutdown()  # waits: processes that are still there when this one ends may keep it from ending
        except BrokenProcessPool as error:
            raise DatasetError(f"{title}: a process was killed, perhaps for memory; try fewer processes") from error
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def measure_all(
    dataset: datasets.Dataset, encoder: RecordEncoder, numbers: Sequence[int], workers: int | None
) -> Iterator[Measured]:
    """The lengths of the records with those numbers, in order; no clip is decoded.

    Args:
        workers: processes; None: as many as there are cores.
    """
    return _for_all(_measure, encoder, dataset, numbers, workers if len(numbers) > _FEW else 1, "Measuring records")


def store_all(dataset: datasets.Dataset, encoder: RecordEncoder, workers: int | None, title: str) -> Iterator[Stored]:
    """Decode all clips of a data set into the reader's cache.

    Args:
        workers: processes, each of which decodes with one thread; None: as many as there are cores.
        title: of the progress bar.
    """
    encoder.reader.threads = 1
    return _for_all(_store, encoder, dataset, range(len(dataset)), workers, title)


def check_lengths(
    dataset: datasets.Dataset,
    encoder: RecordEncoder,
    name: str,
    workers: int | None,
    report_dir: Path,
    log: Callable[[str], None],
) -> None:
    """See before training that every record fits the cutoff, or which clips are made smaller for it.

    A record whose clips cannot make it too long, whatever they hold, is not measured, and its clips are not probed.

    Args:
        name: of the data set; names the report.
        workers: processes; None: as many as there are cores.
        report_dir: where the list of records is written when there are any.
        log: takes a line for the person who runs this.

    Raises:
        DatasetError: listing every record that does not fit, or whose clips cannot be planned.
    """
    numbers = _long_records(dataset, encoder)
    found = list(measure_all(dataset, encoder, numbers, workers)) if numbers else []
    problems = [measured.problem for measured in found if measured.problem]
    changes = [measured.change for measured in found if measured.change]
    for lines, kind in ((changes, "shrunk"), (problems, "too_long")):
        report = report_dir / f"{kind}_records_{name}.txt"
        if not lines:
            report.unlink(missing_ok=True)
            continue
        report_dir.mkdir(parents=True, exist_ok=True)
        report.write_text("\n".join(lines) + "\n", encoding="utf-8")
        text = WrongRecords(len(lines), lines).text(report)
        if kind == "shrunk":
            log(f"{name}: clips of {len(lines)} of {len(dataset)} records are made smaller to fit the cutoff:\n{text}")
            continue
        advice = "`video_fit: shrink` makes clips of records over the cutoff smaller."
        raise DatasetError(
            f"{name}: {len(lines)} of {len(dataset)} records cannot be shown whole:\n{text}"
            + (f"\n{advice}" if any("are more than cutoff_len" in line for line in lines) else ""),
            len(lines),
        )


def _long_records(dataset: datasets.Dataset, encoder: RecordEncoder) -> list[int]:
    """Numbers of the records that may be too long."""
    numbers: list[int] = []
    names = ("_prompt", "_response", "_system", "_tools", "_images", "_videos")
    with tqdm(total=len(dataset), unit=" records", desc="Looking for long records", mininterval=1) as bar:
        for start in range(0, len(dataset), _ROWS):
            part = dataset[start : start + _ROWS]
            rows = zip(*(part[name] for name in names), strict=True)
            numbers += [
                number
                for number, values in enumerate(rows, start)
                if encoder.may_be_too_long(dict(zip(names, values, strict=True)))
            ]
            bar.update(len(part["_prompt"]))
    return numbers
