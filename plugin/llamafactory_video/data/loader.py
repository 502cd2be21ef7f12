"""Annotation files -> an Arrow table of checked conversations, and from there token ids, one record at a time.

Records are read as a stream and written to an Arrow file in the Hugging Face datasets cache, keyed by the
annotation files' paths, sizes and times and by the settings. The table is memory-mapped: 200,000 records or a
million take the same memory, and the processes of a run share it. Nothing is expanded ahead: token ids are made
when a record is asked for (`RecordEncoder`), so no disk or memory goes to visual tokens.
"""

import codecs
import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from jinja2 import TemplateError as JinjaError
from tqdm import tqdm

from .. import __version__
from ..video.probe import ClipError
from ..video.sampling import Sampling
from .conversation import Conversation, Problem, RecordDecoder, RecordKeys, parse_record, read_json

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
_SHOWN = 50  # problems printed; the report file has all


class DatasetError(ValueError):
    """Annotation files with wrong records; the message lists them.

    Attributes:
        wrong: how many records are wrong.
    """

    def __init__(self, message: str, wrong: int = 1) -> None:
        super().__init__(message)
        self.wrong = wrong


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

    def add(self, record: RawRecord, problems: list[Problem]) -> None:
        self.records += 1
        self.lines.extend(f"{record.place}: {problem}" for problem in problems)
        self.cut_off |= record.is_last

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
    facts = [__version__, repr(settings)]
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
        record = RawRecord(Path(name), number, 0, read_json(row["_record"])[0])
        conversation, problems = parse_record(record.value, find, keys, indent)
        if problems:
            wrong.add(record, problems)
        else:
            good.append(to_row(conversation, record.place))
    _report(wrong, Path(name), len(rows), skip_wrong, name, report_dir, log)
    return datasets.Dataset.from_list(good, features=FEATURES)


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
        sampling: how clips are sampled.
        cutoff_len: the most tokens that a record may have; none is cut.
        generation: prompts alone in `input_ids`, the last answer in `labels`.
        train_on_prompt: labels on the prompt's text too.
        last_turn_only: labels on the last answer alone (LLaMA-Factory's `mask_history`).
    """

    def __init__(
        self,
        tokenizer: Any,
        processor: Any,
        sampling: Sampling,
        cutoff_len: int,
        thinking: bool = False,
        default_system: str = "",
        generation: bool = False,
        train_on_prompt: bool = False,
        last_turn_only: bool = False,
    ) -> None:
        self.tokenizer, self.processor, self.sampling = tokenizer, processor, sampling
        self.cutoff_len, self.thinking, self.default_system = cutoff_len, thinking, default_system
        self.generation, self.train_on_prompt, self.last_turn_only = generation, train_on_prompt, last_turn_only

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """A batch of columns -> a batch of columns, as `Dataset.with_transform` wants it."""
        names = list(rows)
        encoded = [self.encode(dict(zip(names, values, strict=True))) for values in zip(*rows.values(), strict=True)]
        return {name: [sample[name] for sample in encoded] for name in encoded[0]}

    def encode(self, row: dict[str, Any]) -> dict[str, Any]:
        """One record.

        Raises:
            DatasetError: naming the record, if it cannot be shown or is too long.
        """
        from ..model.template import IGNORE_INDEX, TemplateError, encode_conversation

        source = row.get("_source") or "a record"
        try:
            ids, labels = encode_conversation(
                row,
                self.tokenizer,
                self.processor,
                self.sampling,
                self.thinking,
                self.default_system,
                self.generation,
            )
        except (ClipError, TemplateError) as error:
            raise DatasetError(f"{source}: {error}") from error
        except (JinjaError, TypeError) as error:
            raise DatasetError(f"{source}: the model's chat template cannot write it ({error})") from error
        pads = (self.processor.image_token_id, self.processor.video_token_id)
        if len(ids) > self.cutoff_len:
            visual = sum(token in pads for token in ids)
            raise DatasetError(
                f"{source}: {len(ids)} tokens, {visual} of them visual, are more than cutoff_len {self.cutoff_len}; "
                f"raise cutoff_len, or lower video_max_pixels or the number of frames"
            )
        if not self.generation and self.train_on_prompt:
            labels = [IGNORE_INDEX if token in pads else token for token in ids]
        elif not self.generation and self.last_turn_only:
            last = max((i for i, label in enumerate(labels) if label == IGNORE_INDEX), default=-1)
            labels = [IGNORE_INDEX] * (last + 1) + labels[last + 1 :]
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": labels,
            "images": row["_images"],
            "videos": row["_videos"],
            "audios": None,
        }

    def describe(self, sample: dict[str, Any]) -> str:
        """A sample as a person reads it, with its runs of visual tokens counted."""
        from ..model.template import IGNORE_INDEX, IMAGE_PAD, VIDEO_PAD

        text = self.tokenizer.decode(sample["input_ids"], skip_special_tokens=False)
        for pad in (IMAGE_PAD, VIDEO_PAD):
            text = re.sub(f"({re.escape(pad)})+", lambda run, pad=pad: f"{pad}*{len(run[0]) // len(pad)}", text)
        said = [label for label in sample["labels"] if label != IGNORE_INDEX]
        answer = self.tokenizer.decode(said, skip_special_tokens=False)
        return f"{text}\nlabels ({len(said)} of {len(sample['input_ids'])} tokens):\n{answer}"
