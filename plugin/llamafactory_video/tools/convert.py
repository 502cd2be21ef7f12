"""`lmf-video convert`: records of other tools' data sets, written as ours."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm


def add_convert(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser(
        "convert",
        help="records of ms-swift, LLaVA-Video, VideoChatGPT, alpaca, OpenAI or Qwen's trainer as ours",
        description="Reads records of ms-swift, LLaVA-Video, VideoChatGPT, alpaca, OpenAI or Qwen's official trainer, each known "
        "by its fields, and writes them in the format video_conversation, one on each line. What cannot be taken over is "
        "listed, and what was read otherwise than it stands.",
    )
    parser.add_argument("input", type=Path, help="records: .json, .jsonl, either with .gz, or a folder of them")
    parser.add_argument("output", type=Path, help="a .jsonl file")
    parser.add_argument(
        "--media-dir",
        type=Path,
        help="folder of clips and pictures: see that they are there (default: names are taken as given)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Convert, and tell what was done.

    Returns:
        How many records are not written.
    """
    from ..records.clips import Problem
    from ..records.convert import converted, relative_to, unpacked
    from ..records.files import MediaFinder, annotation_files, read_records, write_records
    from ..records.report import WrongRecords

    if options.media_dir is not None and not options.media_dir.is_dir():
        raise ValueError(f"--media-dir: no folder {options.media_dir}")
    files = annotation_files(options.input)
    wrong = WrongRecords()
    find, name_of = (lambda path: path), (lambda path: path)
    if options.media_dir is not None:
        find, name_of = MediaFinder(str(options.media_dir)), relative_to(str(options.media_dir))

    def records() -> Iterator[dict[str, Any]]:
        with tqdm(unit=" records", desc="Converting", mininterval=1) as bar:
            for raw in (raw for file in files for raw in read_records(file)):
                if raw.error:
                    wrong.add(raw, [Problem("record", raw.error, "one JSON object is needed")])
                for value in unpacked(raw.value) if not raw.error else ():
                    bar.update()
                    record, problems, notes = converted(value, find, name_of)
                    if problems:
                        wrong.add(raw, problems)
                    else:
                        wrong.note(raw, notes)
                        yield record

    count = write_records(options.output, records(), files)
    for note, (times, place) in wrong.notes.items():
        print(f"{note} ({times} times, first in {place})")
    report = Path(f"{options.output}.wrong.txt")
    report.unlink(missing_ok=True)
    if wrong.records:
        report.write_text("\n".join(wrong.lines) + "\n", encoding="utf-8")
        print(f"{wrong.records} records are not written:\n{wrong.text(report)}", file=sys.stderr)
    if not count:
        raise ValueError(f"{options.input}: no record of it could be converted")
    entry = {options.output.stem: {"file_name": str(options.output), "formatting": "video_conversation"}}
    print(f"{options.output}: {count} records. In dataset_info.json:\n  {json.dumps(entry, ensure_ascii=False)[1:-1]}")
    return wrong.records
