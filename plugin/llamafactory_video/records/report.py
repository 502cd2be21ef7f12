"""Wrong records, listed for a person."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .clips import Problem

_LISTED = 50  # problems printed; the report file has all


class DatasetError(ValueError):
    """Annotation files with wrong records; the message lists them.

    Attributes:
        wrong: how many records are wrong; 0 if it is about something else.
        lengths: tokens, and visual ones among them, of a record that is too long.
    """

    def __init__(self, message: str, wrong: int = 0, lengths: tuple[int, int] = (0, 0)) -> None:
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
    def location(self) -> str:
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
        self.lines.extend(f"{record.location}: {problem}" for problem in problems)
        self.cut_off |= record.is_last

    def note(self, record: RawRecord, notes: list[str]) -> None:
        for note in notes:
            self.notes.setdefault(note, [0, record.location])[0] += 1

    def text(self, report: Path | None) -> str:
        shown = "\n".join(f"  {line}" for line in self.lines[:_LISTED])
        more = len(self.lines) - _LISTED
        rest = f"\n  … and {more} more" if more > 0 else ""
        return f"{shown}{rest}" + (f"\nAll of them are listed in {report}." if report else "")


def may_be_left_out(wrong: int, total: int, most_wrong: float) -> bool:
    """Whether so many records of a data set may be left out: at most that share, and not all."""
    return wrong < total and wrong <= most_wrong * total


def advice_on_wrong(most_wrong: float) -> str:
    """What to do about wrong records that may not be left out."""
    if not most_wrong:
        return "Correct them, or leave them out with `skip_wrong_records: true`."
    return (
        f"These are more than skip_wrong_share, {most_wrong:g} of all, so none is left out. Correct them, or raise it."
    )


def report_wrong(
    wrong: WrongRecords,
    path: Path,
    total: int,
    most_wrong: float,
    name: str | None,
    report_dir: Path | None,
    log: Callable[[str], None],
) -> None:
    """Tell what is wrong with a data set, and what was read otherwise than it stands.

    Args:
        most_wrong: the greatest share of its records that may be left out.
        name, report_dir: of the list of wrong records.

    Raises:
        DatasetError: if none may be left out, or not as many.
    """
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
    if may_be_left_out(wrong.records, total, most_wrong) and not wrong.cut_off:
        log(f"{summary} and left out, {left} remain:\n{wrong.text(report)}")
        return
    advice = advice_on_wrong(most_wrong)
    if wrong.cut_off:
        advice = "A file could not be read to its end, so nothing can be left out; correct it."
    raise DatasetError(f"{summary}:\n{wrong.text(report)}\n{advice}", wrong.records)
