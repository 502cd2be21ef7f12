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
from ..records.report import DatasetError, WrongRecords
from ..records.table import Records
from ..video.probe import ClipError
from ..video.threads import usable_cores
from .encoder import Encoder

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
    """How many of a record's clips were decoded into the cache, and were there; what is wrong with it, or lost."""

    decoded: int = 0
    found: int = 0
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
        clips = encoder.encode(conversation).clips
        decoded = [encoder.reader.store(clip) for clip in clips]
        notes = [
            f"{conversation.name}: {clip.clip}: {note}" for clip in clips if (note := encoder.reader.note(clip.clip))
        ]
        return Stored(sum(decoded), len(decoded) - sum(decoded), notes=tuple(notes))
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
    """Decode all clips of a data set into the reader's cache.

    Args:
        workers: processes, each of which decodes with one thread; None: as many as there are cores.
        title: of the progress bar.
    """
    encoder.reader.threads = 1
    return _for_all(_store, encoder, records, range(len(records)), workers, title)


def check_lengths(
    records: Records,
    encoder: Encoder,
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
    numbers = _long_records(records, encoder)
    found = list(measure_all(records, encoder, numbers, workers)) if numbers else []
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
            log(f"{name}: clips of {len(lines)} of {len(records)} records are made smaller to fit the cutoff:\n{text}")
            continue
        advice = "With `video_fit: shrink`, clips of records over the cutoff are made smaller."
        raise DatasetError(
            f"{name}: {len(lines)} of {len(records)} records cannot be used:\n{text}"
            + (f"\n{advice}" if any("are more than cutoff_len" in line for line in lines) else ""),
            len(lines),
        )


def _long_records(records: Records, encoder: Encoder) -> list[int]:
    """Numbers of the records that may be too long."""
    bar = tqdm(records, unit=" records", desc="Looking for long records", mininterval=1)
    return [number for number, conversation in enumerate(bar) if encoder.may_be_too_long(conversation)]
