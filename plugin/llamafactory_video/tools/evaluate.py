"""`lmf-video eval` and `score`: are a model's answers right, and better than another's?"""

import argparse
import json
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

from ..evaluate.page import Strip, bytes_for_each, make_strip, write_page
from ..evaluate.report import Example, Report, fallen, make_report, p_text, table
from ..media import USER, Conversation, is_address
from ..records.files import write_records
from ..records.question import Asked, read_questions
from ..records.schema import read_schema
from ..video.threads import usable_cores
from .infer import add_answering, answer_into, decoding_of, sampling_of

RECORDS, REPORT, PAGE = "records.jsonl", "report.json", "report.html"


def add_eval(commands: Any) -> None:
    """Add the options of both commands."""
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
    add_answering(parser)
    _add_judging(parser)
    parser.set_defaults(run=evaluate)
    scoring = commands.add_parser(
        "score",
        help="judge answers that are there",
        description="Judges files of answers with their right ones: what `lmf-video infer --data … --out` writes, and "
        "LLaMA-Factory's generated_predictions.jsonl. Several are compared, each with the first.",
    )
    scoring.add_argument("answers", nargs="+", help="FILE or NAME=FILE")
    _add_judging(scoring)
    scoring.set_defaults(run=score)


def _add_judging(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how answers are judged")
    group.add_argument("--out", type=Path, help="folder of the report (default: output/eval)")
    group.add_argument("--fits", type=Path, metavar="SCHEMA", help="a JSON Schema that answers should fit")
    group.add_argument("--by", metavar="FIELD", help="scores for each value of this field of the right answers too")
    group.add_argument(
        "--text", nargs="+", default=[], metavar="FIELD", help="fields that are free text, however short"
    )
    group.add_argument(
        "--source",
        default="file",
        metavar="RULE",
        help="what tells the recording that a clip is of: file (default), folder, or a regular expression for its path",
    )
    group.add_argument("--draw", type=int, default=0, help="seed of what is drawn at random (default 0)")
    group.add_argument(
        "--gate",
        type=Path,
        metavar="REPORT",
        help="an earlier report.json: exit with 1 if the last model is worse than its last one by more than chance allows",
    )


def evaluate(options: argparse.Namespace) -> int:
    """Ask, judge and compare.

    Returns:
        1 if the gate is closed, else 0.
    """
    if not options.model and not options.answers:
        raise ValueError("nothing to judge: give --model or --answers")
    path, media_dir = _data(options)
    asked = [each for each in read_questions(path, media_dir) if each.label is not None]
    if not asked:
        raise ValueError(f"{path}: no record with a right answer")
    if options.limit is not None and options.limit < len(asked):
        if options.limit < 1:
            raise ValueError(f"--limit is {options.limit}; it must be at least 1")
        chosen = random.Random(options.draw).sample(range(len(asked)), options.limit)
        asked = [asked[number] for number in sorted(chosen)]
    out = options.out or Path("output/eval")
    answers: dict[str, list[str | None]] = {}
    for name, file in map(_named, options.answers):
        answers[_new(name, answers)] = _found(Path(file), asked)
    decoding = decoding_of(options) if options.model else None
    if options.sampled_as is None:
        options.sampled_as = _first_that_tells([model for _, model in map(_named, options.model)])
    for name, model in map(_named, options.model):
        file = out / "answers" / f"{_new(name, answers)}.jsonl"
        print(f"{name}: {model}", file=sys.stderr)
        one = copy(options)
        one.model, one.adapter, one.json, one.explain = model, [], False, False
        answer_into(file, asked, decoding, one)
        answers[name] = _found(file, asked)
    examples = [Example(each.source, each.shown, each.label, _prompt(each.conversation)) for each in asked]
    here = [model for _, model in map(_named, options.model) if not is_address(model)]
    shown_by = options.shown_by or next(reversed(here), None)
    strips = [] if shown_by is None else _strips(asked, shown_by, options)
    return _conclude(examples, answers, out, options, strips, [_played(each.conversation, out) for each in asked])


def score(options: argparse.Namespace) -> int:
    """Judge and compare answers that are there.

    Returns:
        1 if the gate is closed, else 0.
    """
    files = [(name, _lines(Path(file))) for name, file in map(_named, options.answers)]
    first = files[0][1]
    examples = []
    for number, line in enumerate(first, start=1):
        label = line.get("label")
        if label is None:
            raise ValueError(f"{options.answers[0]}, line {number}: no label, which an answer is judged by")
        label = label.strip() if isinstance(label, str) else label
        shown = line.get("shown") or line.get("clips") or ()
        examples.append(
            Example(str(line.get("source", f"line {number}")), tuple(shown), label, _plain(line.get("prompt")))
        )
    asked = [Asked(example.source, ValueError(), example.clips, example.label) for example in examples]
    answers: dict[str, list[str | None]] = {}
    for name, lines in files:
        answers[_new(name, answers)] = _of(lines, asked, name)
    return _conclude(examples, answers, options.out or Path("output/eval"), options)


def _first_that_tells(models: Sequence[str]) -> str | None:
    """The first model that tells how its clips are sampled: one that does not, as before training, is shown the same."""
    from ..model.loading import contract_of

    return next((model for model in models if not is_address(model) and contract_of(model) is not None), None)


def _data(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """The records' file or folder, and that of their clips."""
    path = Path(options.data)
    if path.exists():
        return path, options.media_dir
    info = options.dataset_dir / "dataset_info.json"
    known = json.loads(info.read_text(encoding="utf-8")) if info.is_file() else {}
    entry = known.get(options.data)
    if entry is None or "file_name" not in entry:
        named = f", nor is it the name of a data set in {info}" if info.is_file() else f"; and there is no {info}"
        raise ValueError(f"no file {path}{named}")
    return options.dataset_dir / entry["file_name"], options.media_dir


def _named(word: str) -> tuple[str, str]:
    """NAME=PATH, or a path by its last folder's or file's name."""
    name, given, path = word.partition("=")
    if given and "/" not in name:
        return name, path
    return Path(word.rpartition("#")[2] if is_address(word) else word).name.removesuffix(".jsonl"), word


def _new(name: str, answers: dict[str, Any]) -> str:
    if name in answers:
        raise ValueError(f"two models are called {name}; give them names: NAME=…")
    return name


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


def _plain(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else ""


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise ValueError(f"no file {file}")
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error})") from error
            if not isinstance(value, dict) or not ({"answer", "predict", "error"} & value.keys()):
                raise ValueError(f"{file}, line {number}: no answer; `answer` or `predict` is needed")
            lines.append(value)
    if not lines:
        raise ValueError(f"{file}: no answers in it")
    return lines


def _found(file: Path, asked: Sequence[Asked]) -> list[str | None]:
    return _of(_lines(file), asked, str(file))


def _of(lines: Sequence[dict[str, Any]], asked: Sequence[Asked], name: str) -> list[str | None]:
    """The answers to questions: by their sources, or one line for each where lines have none."""
    texts = [line.get("answer", line.get("predict")) for line in lines]
    if all("source" in line for line in lines):
        by_source = {line["source"]: text for line, text in zip(lines, texts, strict=True)}
        missing = [each.source for each in asked if each.source not in by_source]
        if missing:
            raise ValueError(
                f"{name}: no answer to {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
            )
        return [by_source[each.source] for each in asked]
    if len(lines) != len(asked):
        raise ValueError(
            f"{name}: {len(lines)} answers for {len(asked)} records, and no `source` that tells which is whose"
        )
    return texts


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


def _conclude(
    examples: Sequence[Example],
    answers: dict[str, list[str | None]],
    out: Path,
    options: argparse.Namespace,
    strips: Sequence[Sequence[Strip]] = (),
    played: Sequence[Sequence[str]] = (),
) -> int:
    """Write the report, print it, and look at the gate."""
    schema = read_schema(options.fits) if options.fits is not None else None
    judging = {"source": options.source, "schema": schema, "texts": options.text, "seed": options.draw}
    report = make_report(examples, answers, by=options.by, **judging)
    out.mkdir(parents=True, exist_ok=True)
    lines = list(_record_lines(examples, answers, report))
    write_records(out / RECORDS, lines, ())
    write_page(out / PAGE, report.value, lines, strips, played)
    (out / REPORT).write_text(json.dumps(report.value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(report.value)}\n")
    if options.by is not None:
        print(_by_table(report.value) + "\n")
    print(report.value["verdict"])
    print(f"{out / PAGE}; in figures {out / REPORT}, each record's answers in {out / RECORDS}")
    return 0 if options.gate is None else _gate(examples, answers, options.gate, judging)


def _record_lines(examples: Sequence[Example], answers: dict[str, list[str | None]], report: Report) -> Any:
    for number, example in enumerate(examples):
        yield {
            "source": example.source,
            "clips": list(example.clips),
            "prompt": example.prompt,
            "label": example.label,
            "answers": {model: said[number] for model, said in answers.items()},
            "scores": {model: round(float(one.scores[number]), 6) for model, one in report.scored.items()},
        }


def _by_table(report: dict[str, Any]) -> str:
    lines = [f"score by {report['by']['field']}"]
    for value, told in report["by"]["values"].items():
        scores = "   ".join(f"{model} {each['value']:.3f}" for model, each in told["models"].items())
        apart = "".join(f"   {each['value']:+.3f} {p_text(each['p'])}" for each in told["differences"].values())
        lines.append(f"  {value} ({told['records']} records)   {scores}{apart}")
    return "\n".join(lines)


def _gate(
    examples: Sequence[Example], answers: dict[str, list[str | None]], baseline: Path, judging: dict[str, Any]
) -> int:
    """Whether the last model is worse than the last one of an earlier report, on the records that both were asked about."""
    baseline = baseline / REPORT if baseline.is_dir() else baseline
    records = baseline.with_name(RECORDS)
    if not baseline.is_file() or not records.is_file():
        raise ValueError(f"--gate: {baseline} needs to be a report.json with its {RECORDS} beside it")
    before = json.loads(baseline.read_text(encoding="utf-8"))
    model, now = list(before["models"])[-1], list(answers)[-1]
    lines = (json.loads(line) for line in records.read_text(encoding="utf-8").splitlines())
    earlier = {line["source"]: line["answers"][model] for line in lines}
    both = [number for number, example in enumerate(examples) if example.source in earlier]
    if not both:
        raise ValueError(f"--gate: {baseline} is of other records; none of these is among them")
    left = {
        "before": [earlier[examples[number].source] for number in both],
        "now": [answers[now][number] for number in both],
    }
    report = make_report([examples[number] for number in both], left, **judging).value
    worse = fallen(report, "now")
    for name, each in worse.items():
        values = [report["models"][which][name]["value"] for which in ("before", "now")]
        print(
            f"gate: {name} of {now} is {values[1]:.3f}, and was {values[0]:.3f} of {model} in {baseline}: {each['value']:+.3f} "
            f"({p_text(each['p'])})",
            file=sys.stderr,
        )
    print(f"gate: {'closed' if worse else 'open'} ({len(both)} records compared with {baseline})", file=sys.stderr)
    return 1 if worse else 0
