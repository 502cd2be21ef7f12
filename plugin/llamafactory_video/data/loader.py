"""Annotation files -> an Arrow table of checked conversations, and from there token ids, one record at a time.

Records are read as a stream and written to an Arrow file in the Hugging Face datasets cache, keyed by the
annotation files' paths, sizes and times and by the settings. The table is memory-mapped: 200,000 records or a
million take the same memory, and the processes of a run share it. Nothing is expanded ahead: token ids are made
when a record is asked for (`ConversationEncoder`), so no disk or memory goes to visual tokens.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from tqdm import tqdm

from .. import __version__
from ..video.probe import ClipError
from ..video.sampling import Sampling
from .conversation import JSON_DECODER, Conversation, Problem, RecordKeys, parse_record

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
    """Annotation files with wrong records; the message lists them."""


@dataclass(frozen=True)
class RawRecord:
    """A record as it stands in its file: `value` if it could be read, else `error`."""

    file: Path
    number: int
    line: int
    value: Any = None
    error: str | None = None

    @property
    def place(self) -> str:
        return f"{self.file}, record {self.number} (line {self.line})"


@dataclass
class WrongRecords:
    """What is wrong with a data set, for a person to read."""

    places: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def add(self, record: RawRecord, problems: list[Problem]) -> None:
        self.places.append(record.place)
        self.lines.extend(f"{record.place}: {problem}" for problem in problems)

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

    A line that is not JSON is one wrong record. In an array nothing can be read after such a place, and the last
    record says so.
    """
    try:
        yield from _read_array(file) if _first_character(file) == "[" else _read_lines(file)
    except UnicodeDecodeError as error:
        yield RawRecord(
            file, 0, 0, error=f"not UTF-8 ({error.reason} at byte {error.start} of a chunk); save it as UTF-8"
        )


def _first_character(file: Path) -> str:
    for text in _read_text(file):
        if text.strip():
            return text.strip()[0]
    return ""


def _decode(text: str) -> tuple[Any, str | None]:
    try:
        value = JSON_DECODER.decode(text)
        # A lone surrogate (\\ud800) is JSON, but no text: it could be neither stored nor tokenized.
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value, None
    except UnicodeEncodeError:
        return None, "holds half a surrogate pair (\\ud800 … \\udfff), which is no character"
    except RecursionError:
        return None, "nested too deeply"
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} at character {error.pos}"
    except ValueError as error:
        return None, f"not JSON: {error}"


def _read_lines(file: Path) -> Iterator[RawRecord]:
    number = 0
    # Split at \n alone: str.splitlines would also split inside texts, at U+2028 and others.
    with file.open(encoding="utf-8-sig", newline="\n") as stream:
        for line, text in enumerate(stream, start=1):
            if text.strip():
                number += 1
                value, error = _decode(text.strip())
                yield RawRecord(file, number, line, value, error)


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

    blanks = " \t\r\n"
    skip(blanks)
    position += 1  # the opening bracket
    following = skip(blanks)
    while following not in ("]", ""):
        number += 1
        while True:
            try:
                value, end = JSON_DECODER.raw_decode(buffer, position)
                # A number or a word at the end of the buffer may go on in the next chunk.
                if end < len(buffer) or ended:
                    break
            except RecursionError:
                yield RawRecord(file, number, line, error="nested too deeply; nothing after it was read")
                return
            except ValueError as error:
                if ended:
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    at = line + buffer.count("\n", position, getattr(error, "pos", position))
                    yield RawRecord(
                        file, number, line, error=f"not JSON: {reason} (line {at}); nothing after it was read"
                    )
                    return
            refill()
        text = buffer[position:end]
        problem = _decode(text)[1] if "\\u" in text else None
        yield RawRecord(file, number, line, value, problem)
        line += text.count("\n")
        position = end
        following = skip(blanks)
        if following == ",":
            position += 1
            following = skip(blanks)
            if following == "]":
                yield RawRecord(file, number + 1, line, error="a comma before the closing bracket; remove it")
                return
        elif following != "]":
            found = f"{following!r}" if following else "the end of the file"
            yield RawRecord(
                file, number + 1, line, error=f"expected , or ] and found {found}; nothing after it was read"
            )
            return
    if following == "":
        yield RawRecord(file, number + 1, line, error="the array does not end: ] is missing; the file may be cut off")
        return
    position += 1
    if rest := skip(blanks):
        yield RawRecord(
            file, number + 1, line, error=f"{rest!r} after the end of the array; nothing after it was read"
        )


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
    if stored.is_file() and not refresh:
        dataset = datasets.Dataset.from_file(str(stored))
        # A clip can vanish while its annotation stays: ask again, by folder, which takes a moment.
        if not _missing_media(dataset, MediaFinder("")):
            return dataset
    wrong = WrongRecords()
    partial = stored.with_suffix(f".{os.getpid()}.tmp")
    count = total = 0
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, FEATURES.arrow_schema) as writer:
            rows: list[dict[str, Any]] = []
            for record, conversation, problems in _checked(files, MediaFinder(media_dir), keys, indent, progress):
                total += 1
                if problems:
                    wrong.add(record, problems)
                else:
                    rows.append(to_row(conversation, f"{record.file.name}, record {record.number}"))
                    count += 1
                if len(rows) >= _ROWS:
                    writer.write(pa.RecordBatch.from_pylist(rows, schema=FEATURES.arrow_schema))
                    rows.clear()
            writer.write(pa.RecordBatch.from_pylist(rows, schema=FEATURES.arrow_schema))
        _report(wrong, path, count, total, skip_wrong, report_dir, log)
        if wrong.places:
            # Not the whole of the files: it must be reported again next time, so it is not a cache entry.
            stored = stored.with_suffix(".skipped.arrow")
        os.replace(partial, stored)
    finally:
        partial.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(stored))


def _checked(
    files: list[Path], find: MediaFinder, keys: RecordKeys, indent: int | None, progress: bool
) -> Iterator[tuple[RawRecord, Conversation, list[Problem]]]:
    with tqdm(unit=" records", desc="Reading annotations", disable=not progress, mininterval=1) as bar:
        for file in files:
            for record in read_records(file):
                bar.update()
                if record.error:
                    yield record, Conversation([]), [Problem("record", record.error, "one JSON object is needed")]
                else:
                    yield record, *parse_record(record.value, find, keys, indent)


def _report(
    wrong: WrongRecords,
    path: Path,
    count: int,
    total: int,
    skip_wrong: bool,
    report_dir: Path | None,
    log: Callable[[str], None],
) -> None:
    if total == 0:
        raise DatasetError(f"{path}: no records in it")
    if not wrong.places:
        return
    report = None
    if report_dir is not None:
        report_dir.mkdir(parents=True, exist_ok=True)
        report = report_dir / f"wrong_records_{path.stem}.txt"
        report.write_text("\n".join(wrong.lines) + "\n", encoding="utf-8")
    summary = f"{path}: {len(wrong.places)} of {total} records are wrong"
    if skip_wrong and count:
        log(f"{summary} and left out, {count} remain:\n{wrong.text(report)}")
        return
    advice = "" if skip_wrong else "\nCorrect them, or leave them out with `skip_wrong_records: true`."
    raise DatasetError(f"{summary}:\n{wrong.text(report)}{advice}")


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
