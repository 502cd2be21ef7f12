"""`lmf-video eval`: models asked about the records of a data set."""

import argparse
import os
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from ..evaluate.page import Strip, bytes_for_each, make_strip
from ..evaluate.report import Example
from ..media import USER, Conversation, is_address
from ..records.files import registered_file
from ..records.question import Asked, read_questions
from ..video.threads import usable_cores
from .answering import add_answering, decoding_of, sampling_of, see_followed
from .infer import answer_into, digest_of, settings_of
from .lmms_task import export_task
from .overlap import check_overlap
from .score import add_judging, answer_lines, answers_of, conclude, named, new_name


def add_eval(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser(
        "eval",
        help="ask models about the records of a data set, and judge and compare their answers",
        description="Asks each model about every record, judges the answers field by field, and compares each model with the "
        "first: with intervals and p values over source videos. Interrupted and started again, it continues.",
    )
    parser.add_argument("data", help="records (.json, .jsonl or a folder), or a name in dataset_info.json")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help="a model's or adapter's folder or OpenAI-compatible address (http://host:8000/v1#ITS-NAME), or NAME=that; given "
        "several times, each is compared with the first",
    )
    parser.add_argument(
        "--answers",
        action="append",
        default=[],
        help="answers that are there, NAME=FILE, as `infer --out` writes them",
    )
    parser.add_argument("--dataset-dir", type=Path, default=Path("dataset_info"), help="where dataset_info.json lies")
    parser.add_argument(
        "--media-dir", type=Path, help="folder that paths in records are relative to (default: theirs)"
    )
    parser.add_argument(
        "--shown-by", metavar="MODEL", help="whose frames the page shows (default: the last --model's)"
    )
    parser.add_argument("--limit", type=int, help="so many records, drawn at random by --draw")
    parser.add_argument(
        "--export-lmms",
        type=Path,
        metavar="DIR",
        help="write the records as a task of lmms-eval into this folder, and ask nothing",
    )
    honest = parser.add_argument_group("clips that were trained on")
    honest.add_argument(
        "--trained-on",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="annotation files that a model was trained on; those of our own runs are known by run.json",
    )
    honest.add_argument("--allow-overlap", action="store_true", help="judge by clips that were trained on, too")
    honest.add_argument(
        "--near",
        action=argparse.BooleanOptionalAction,
        help="look for clips that look alike (default: of at most 2000 clips)",
    )
    add_answering(parser)
    add_judging(parser)
    parser.set_defaults(run=evaluate)


def evaluate(options: argparse.Namespace) -> int:
    """Ask, judge and compare.

    Returns:
        1 if the gate is closed, else 0.
    """
    if not options.model and not options.answers and options.export_lmms is None:
        raise ValueError("nothing to judge: give --model or --answers")
    path, media_dir = _data(options)
    records = list(read_questions(path, media_dir))
    asked = [each for each in records if each.label is not None]
    if not asked:
        raise ValueError(f"{path}: no record with a right answer")
    if len(asked) < len(records):
        print(
            f"lmf-video: {len(records) - len(asked)} of {len(records)} records have no right answer", file=sys.stderr
        )
    if options.limit is not None and options.limit < len(asked):
        if options.limit < 1:
            raise ValueError(f"--limit is {options.limit}; it must be at least 1")
        chosen = random.Random(options.draw).sample(range(len(asked)), options.limit)
        asked = [asked[number] for number in sorted(chosen)]
    if options.export_lmms is not None:
        export_task(asked, options.export_lmms, options.max_new_tokens)
        return 0
    see_followed([model for _, model in map(named, options.model)], options)
    check_overlap(asked, [model for _, model in map(named, options.model) if not is_address(model)], options)
    out = options.out or Path("output/eval")
    answers: dict[str, list[str | None]] = {}
    for name, file in map(named, options.answers):
        answers[new_name(name, answers)] = _found(Path(file), asked)
    decoding = decoding_of(options) if options.model else None
    if options.sampled_as is None:
        options.sampled_as = _first_that_tells([model for _, model in map(named, options.model)])
    for name, model in map(named, options.model):
        print(f"{new_name(name, answers)}: {model}", file=sys.stderr)
        one = copy(options)
        one.model, one.adapter, one.json, one.explain = model, [], False, False
        # A file for each way of answering: a model that was trained again is asked again.
        file = out / "answers" / f"{name}.{digest_of(settings_of(decoding, one))[:8]}.jsonl"
        answer_into(file, asked, decoding, one)
        answers[name] = _found(file, asked)
    examples = [Example(each.source, each.shown, each.label, _prompt(each.conversation)) for each in asked]
    here = [model for _, model in map(named, options.model) if not is_address(model)]
    shown_by = options.shown_by or next(reversed(here), None)
    strips = [] if shown_by is None else _strips(asked, shown_by, options)
    return conclude(examples, answers, out, options, strips, [_played(each.conversation, out) for each in asked])


def _first_that_tells(models: Sequence[str]) -> str | None:
    """The first model that tells how its clips are sampled: one that does not, as before training, is shown the same."""
    from ..model.loading import contract_of

    return next((model for model in models if not is_address(model) and contract_of(model) is not None), None)


def _data(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """The records' file or folder, and that of their clips."""
    path = Path(options.data)
    if path.exists():
        return path, options.media_dir
    file = registered_file(options.dataset_dir, options.data)
    if file is None:
        info = options.dataset_dir / "dataset_info.json"
        named = f", nor is it the name of a data set in {info}" if info.is_file() else f"; and there is no {info}"
        raise ValueError(f"no file {path}{named}")
    return file, options.media_dir


def _prompt(conversation: Any) -> str:
    if not isinstance(conversation, Conversation):
        return ""
    return next((text for role, text in reversed(conversation.messages) if role == USER), "")


def _played(conversation: Any, out: Path) -> list[str]:
    """Where a page in that folder finds the clips of a question, with the part that is meant."""
    urls = []
    for clip in conversation.videos if isinstance(conversation, Conversation) else ():
        if isinstance(clip.path, str):
            path = clip.path if is_address(clip.path) else quote(os.path.relpath(clip.path, out).replace(os.sep, "/"))
            part = "" if clip.start is None and clip.end is None else f"#t={clip.start or 0:g}"
            urls.append(path + part + (f",{clip.end:g}" if clip.end is not None else ""))
    return urls


def _found(file: Path, asked: Sequence[Asked]) -> list[str | None]:
    return answers_of(answer_lines(file), asked, str(file))


def _strips(asked: Sequence[Asked], model: str, options: argparse.Namespace) -> list[list[Strip]]:
    """The frames that a model is shown in each question, in small."""
    from ..model.loading import load_encoder
    from ..records.report import DatasetError

    how = {"remote_media": options.remote_media, "sampled_as": options.sampled_as, "log": lambda _: None}
    encoder = load_encoder(model, **how, **sampling_of(options))
    count = sum(len(each.shown) for each in asked)

    def look(each: Asked) -> list[Strip]:
        try:
            sample, clips = encoder.load(each.conversation)
        except DatasetError:
            return []  # its answer is an error, which says so
        shown = [make_strip(clip.frames, clip.plan.times, bytes_for_each(count)) for clip in clips]
        pictures = (np.asarray(image)[None] for image in sample.images)
        return [*shown, *(make_strip(picture, [None], bytes_for_each(count)) for picture in pictures)]

    right = [each if isinstance(each.conversation, Conversation) else None for each in asked]
    with ThreadPoolExecutor(usable_cores()) as pool:
        work = pool.map(lambda each: [] if each is None else look(each), right)
        return list(tqdm(work, "Frames for the page", len(right), unit=" records", mininterval=1))
