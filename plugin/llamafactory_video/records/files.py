"""Annotation files -> their records, read as a stream; and the files that records name."""

import codecs
import gzip
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..words import nearest
from .json_text import RecordDecoder, json_text, read_json
from .report import DatasetError, RawRecord

_EXPLAINED = 100  # missing files; more than are printed
_CHUNK = 4 << 20  # characters read from a file at a time


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


def registered_file(dataset_dir: Path, name: str) -> Path | None:
    """The file or folder that dataset_info.json has under a name; None if it has none."""
    info = dataset_dir / "dataset_info.json"
    known = json.loads(info.read_text(encoding="utf-8")) if info.is_file() else {}
    file = known.get(name, {}).get("file_name")
    return dataset_dir / file if file else None


def _open(file: Path) -> BinaryIO:
    """A file to read, also one that gzip has packed."""
    stream = file.open("rb")
    is_packed = stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    return gzip.GzipFile(fileobj=stream) if is_packed else stream


def _read_text(file: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with _open(file) as stream:
        while chunk := stream.read(_CHUNK):
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)


def read_records(file: Path) -> Iterator[RawRecord]:
    """The records of one file, in order: a JSON array, one JSON value on each line, or objects one after another.

    A record that is wrong in itself is one wrong record. Where the rest of a file cannot be read, the last record
    says so.
    """
    try:
        with _open(file) as stream:
            begin = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
            stream.seek(0)
            line = stream.readline().removeprefix(codecs.BOM_UTF8).strip() or begin.partition(b"\n")[0]
        if kind := _other_kind(file, begin):
            yield RawRecord(file, 0, 0, error=f"{kind}; records are read from .json and .jsonl files", is_last=True)
        elif begin.startswith(b"["):
            yield from _read_array(file)
        elif begin.startswith(b"{") and not _is_json(line):
            yield from _read_objects(file)
        else:
            yield from _read_lines(file)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        reason = (
            f"not UTF-8 ({error.reason}); save the file as UTF-8" if isinstance(error, UnicodeDecodeError) else error
        )
        yield RawRecord(file, 0, 0, error=str(reason), is_last=True)


def _other_kind(file: Path, begin: bytes) -> str | None:
    """What a file is that holds no JSON."""
    if begin.startswith(b"PAR1"):
        return 'a parquet file; write its records with datasets.Dataset.from_parquet(…).to_json("data.jsonl")'
    if begin.startswith(b"PK"):
        return "a zip archive or a spreadsheet"
    return "a table" if file.suffix.lower() in (".csv", ".tsv") else None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_objects(file: Path) -> Iterator[RawRecord]:
    """Objects that span lines, one after another, which is no JSON, and yet means one thing."""
    text = "".join(_read_text(file))
    decoder, position, number = RecordDecoder(), 0, 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        number += 1
        line = 1 + text.count("\n", 0, position)
        decoder.problems = []
        try:
            value, end = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = (
                f"not JSON: {error.msg} (line {error.lineno})" if hasattr(error, "lineno") else "nested too deeply"
            )
            yield RawRecord(file, number, line, error=f"{reason}; nothing after it was read", is_last=True)
            return
        problems = read_json(text[position:end])[1]
        yield RawRecord(file, number, line, value, "; ".join(problems) or None)
        position = end


def _read_lines(file: Path) -> Iterator[RawRecord]:
    number = 0
    # Lines end at \n alone: str.splitlines would also split inside texts, at U+2028 and others.
    with _open(file) as stream:
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
        problems = decoder.wrong(value)
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


def write_records(path: Path, records: Iterable[Any], read_from: Iterable[Path]) -> int:
    """Write records one on each line, whole or not at all; without any there is no file.

    Args:
        read_from: the files that they come from, which are not replaced.

    Returns:
        How many there were.

    Raises:
        ValueError: if the file is one of those.
    """
    if path.exists() and any(file.samefile(path) for file in read_from):
        raise ValueError(f"{path} would replace the records that it is made from; give another name")
    partial, count = path.with_name(f"{path.name}.tmp"), 0
    try:
        with partial.open("w", encoding="utf-8") as lines:
            for record in records:
                lines.write(f"{json_text(record)}\n")
                count += 1
        if count:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


class MediaFinder:
    """Finds the files that records name, below `media_dir` first, then as the path stands.

    Each folder is listed once: asking a network file system for every clip of 200,000 would take minutes.

    Args:
        remote: whether addresses may be given too.
    """

    def __init__(self, media_dir: str, remote: bool = False) -> None:
        self.media_dir, self.remote = media_dir, remote
        self._listings: dict[str, frozenset[str]] = {}
        self._explained = 0

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
        """Where the file lies: as it is named, or as the same name is written elsewhere."""
        return self._find(path) or next(filter(None, map(self._find, _other_spellings(path))), None)

    def _find(self, path: str) -> str | None:
        return next((place for place in (os.path.join(self.media_dir, path), path) if self._is_file(place)), None)

    def explain(self, path: str) -> str:
        """Why there is no such file, for a person; of many, of the first ones, since it asks the disk often."""
        folder, name = os.path.split(os.path.join(self.media_dir, path))
        self._explained += 1
        if self._explained > _EXPLAINED:
            return f"looked in {folder or '.'}"
        for spelled in (path, *_other_spellings(path)):
            for place in (os.path.join(self.media_dir, spelled), spelled):
                if os.path.isdir(place):
                    return f"{place} is a folder; list its pictures in `frames`"
        if not os.path.isdir(folder or "."):
            return f"there is no folder {folder}"
        near = nearest(name, self._listings.get(folder, ()))
        return f"is {near} in {folder or '.'} meant?" if near else f"looked in {folder or '.'}"


def _other_spellings(path: str) -> list[str]:
    """The same path with the slashes of this system, from the home folder, without blanks around it, in other Unicode forms."""
    path = path.strip()
    turned = path.replace("\\", "/")
    forms = [path, turned, os.path.expanduser(turned)]
    return [unicodedata.normalize(form, each) for each in forms for form in ("NFC", "NFD")] + forms
