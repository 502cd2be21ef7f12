"""All records of a data set measured, or their clips stored, by several processes."""

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from ..media import Conversation
from ..records.report import DatasetError, WrongRecords, advice_on_wrong, may_be_left_out
from ..records.table import Records
from ..video.pictures import open_picture
from ..video.probe import ClipError
from ..video.threads import usable_cores
from .encoder import Encoder
from .left_out import LeftOut, write_list

Result = TypeVar("Result")
_PART = 5000  # records handed out at a time
_FEW = 64  # records that are measured without other processes


@dataclass(frozen=True)
class Measured:
    """A record's length in tokens, or what is wrong with it, or what was done to make it fit."""

    tokens: int = 0
    visual: int = 0
    problem: str = ""
    change: str = ""


@dataclass(frozen=True)
class Stored:
    """How many of a record's clips were decoded into the cache, and were there; its pictures; what is wrong, or lost."""

    decoded: int = 0
    found: int = 0
    pictures: int = 0
    problem: str = ""
    notes: tuple[str, ...] = ()


def _measure(encoder: Encoder, conversation: Conversation) -> Measured:
    try:
        sample = encoder.encode(conversation)
    except DatasetError as error:
        return Measured(*error.lengths, problem=str(error))
    return Measured(len(sample.ids), encoder.visual_tokens(sample.ids), change=sample.change)


def _store(encoder: Encoder, conversation: Conversation) -> Stored:
    try:
        sample = encoder.encode(conversation)
        clips, decoded = sample.clips, [encoder.reader.store(clip) for clip in sample.clips]
        for picture in sample.images:
            open_picture(picture)
        notes = [
            f"{conversation.name}: {clip.clip}: {note}" for clip in clips if (note := encoder.reader.note(clip.clip))
        ]
        return Stored(sum(decoded), len(decoded) - sum(decoded), len(sample.images), notes=tuple(notes))
    except ClipError as error:
        return Stored(problem=f"{conversation.name}: {error}")
    except DatasetError as error:
        return Stored(problem=str(error))


_work: Callable[[Conversation], Any] | None = None  # of a process of `_for_all`


def _start_work(work: Callable[[Encoder, Conversation], Any], encoder: Encoder) -> None:
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


def _do_work(conversation: Conversation) -> Any:
    return _work(conversation)


def _for_all(
    work: Callable[[Encoder, Conversation], Result],
    encoder: Encoder,
    records: Records,
    numbers: Sequence[int],
    workers: int | None,
    title: str,
) -> Iterator[Result]:
    """What `work` makes of the records with those numbers, in order, by several processes, with a progress bar."""
    workers = workers or usable_cores()
    parts = (records.select(numbers[at : at + _PART]) for at in range(0, len(numbers), _PART))
    with tqdm(total=len(numbers), unit=" records", desc=title) as bar:
        if workers < 2:
            for part in parts:
                for conversation in part:
                    yield work(encoder, conversation)
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


def measure_all(records: Records, encoder: Encoder, numbers: Sequence[int], workers: int | None) -> Iterator[Measured]:
    """The lengths of the records with those numbers, in order; no clip is decoded.

    Args:
        workers: processes; None: as many as there are cores.
    """
    return _for_all(_measure, encoder, records, numbers, workers if len(numbers) > _FEW else 1, "Measuring records")


def store_all(records: Records, encoder: Encoder, workers: int | None, title: str) -> Iterator[Stored]:
    """Decode all clips of a data set into the reader's cache, and its pictures to see that they can be.

    Args:
        workers: processes, each of which decodes with one thread; None: as many as there are cores.
        title: of the progress bar.
    """
    threads, encoder.reader.threads = encoder.reader.threads, 1
    try:
        yield from _for_all(_store, encoder, records, range(len(records)), workers, title)
    finally:
        encoder.reader.threads = threads


def check_samples(
    records: Records,
    encoder: Encoder,
    name: str,
    workers: int | None,
    report_dir: Path,
    log: Callable[[str], None],
    most_wrong: float = 0.0,
    decoding: bool = False,
) -> list[int]:
    """See before training that every record fits the cutoff, or which clips are made smaller for it.

    A record whose clips cannot make it too long, whatever they hold, is not measured, and its clips are not probed; unless
    records may be left out: then all are.

    Args:
        name: of the data set; names the reports.
        workers: processes; None: as many as there are cores.
        report_dir: where the lists of records are written when there are any.
        log: takes a line for the person who runs this.
        most_wrong: the greatest share of the records that may be left out.
        decoding: find clips and pictures too that are damaged behind a good header, by decoding them into the cache.

    Returns:
        Numbers of the records to leave out.

    Raises:
        DatasetError: listing every record that does not fit, or whose clips cannot be planned, if not all may be left out.
    """
    numbers = range(len(records)) if most_wrong else _long_records(records, encoder)
    found = list(measure_all(records, encoder, numbers, workers)) if numbers else []
    problems = {number: told.problem for number, told in zip(numbers, found, strict=True) if told.problem}
    changes = [measured.change for measured in found if measured.change]
    if decoding:
        good = [number for number in range(len(records)) if number not in problems]
        stored = store_all(records.select(good), encoder, workers, f"Decoding {name}")
        problems |= {number: told.problem for number, told in zip(good, stored, strict=True) if told.problem}
    shrunk, too_long = (report_dir / f"{kind}_records_{name}.txt" for kind in ("shrunk", "too_long"))
    if write_list(shrunk, changes):
        log(
            f"{name}: clips of {len(changes)} of {len(records)} records are made smaller to fit the cutoff:\n"
            f"{WrongRecords(len(changes), changes).text(shrunk)}"
        )
    lines = list(problems.values())
    left_out = LeftOut(left_out_file(report_dir, name), len(records), most_wrong)
    if may_be_left_out(len(lines), len(records), most_wrong):
        left_out.begin(lines)
        write_list(too_long, [])
        if lines:
            text = WrongRecords(len(lines), lines).text(left_out.file)
            log(f"{name}: {len(lines)} of {len(records)} records cannot be used and are left out:\n{text}")
        return list(problems)
    left_out.begin([])
    if write_list(too_long, lines):
        shrinkable = any("are more than cutoff_len" in line for line in lines)
        advice = "\nWith `video_fit: shrink`, clips of records over the cutoff are made smaller." if shrinkable else ""
        raise DatasetError(
            f"{name}: {len(lines)} of {len(records)} records cannot be used:\n"
            f"{WrongRecords(len(lines), lines).text(too_long)}\n{advice_on_wrong(most_wrong)}{advice}",
            len(lines),
        )
    return []


def left_out_file(report_dir: Path, name: str) -> Path:
    """Where records that are left out are listed."""
    return report_dir / f"left_out_records_{name}.txt"


def _long_records(records: Records, encoder: Encoder) -> list[int]:
    """Numbers of the records that may be too long."""
    bar = tqdm(records, unit=" records", desc="Looking for long records", mininterval=1)
    return [number for number, conversation in enumerate(bar) if encoder.may_be_too_long(conversation)]
