"""Records that turn out, while a run goes on, not to be shown: left out, with a list, as long as they are few."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..records.report import DatasetError, advice_on_wrong, may_be_left_out

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeftOut:
    """The list of them, in a file to which all processes of a run add: those that read clips, on all ranks.

    Where nodes share no disk, each counts its own.

    Args:
        total: records of the data set, those left out before training included.
        most_wrong: the greatest share of them that may be left out.
    """

    file: Path
    total: int
    most_wrong: float

    def begin(self, problems: Iterable[str]) -> None:
        """Start the list with what was found before training; without any, there is none."""
        write_list(self.file, [_line(problem) for problem in problems])

    def add(self, problem: str) -> None:
        """One more, unless it is in the list already, from an earlier epoch say.

        Raises:
            DatasetError: if these are more than may be left out.
        """
        known = set(self.file.read_text(encoding="utf-8").splitlines()) if self.file.is_file() else set()
        if (line := _line(problem)) in known:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as list_:
            list_.write(f"{line}\n")
        count = len(known) + 1
        told = f"{count} of {self.total} records cannot be used; they are listed in {self.file}"
        if not may_be_left_out(count, self.total, self.most_wrong):
            raise DatasetError(f"{line}\n{told}. {advice_on_wrong(self.most_wrong)}", count)
        logger.warning("%s. It is left out. %s.", line, told)


def write_list(file: Path, lines: Sequence[str]) -> bool:
    """Write a list, if there is anything in it; else remove an earlier one. Whether there is."""
    file.unlink(missing_ok=True)
    if lines:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return bool(lines)


def _line(problem: str) -> str:
    return " ".join(problem.split("\n"))
