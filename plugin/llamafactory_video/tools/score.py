"""`lmf-video score`, and what `lmf-video eval` does once it has answers: judged, compared, reported, held against a gate."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..evaluate.fields import fields_of
from ..evaluate.measures import read_label, text_pairs
from ..evaluate.page import Strip, write_page
from ..evaluate.report import Example, Report, fallen, make_report, p_text, table
from ..media import ASSISTANT, USER, Conversation, is_address
from ..records.files import write_records
from ..records.question import Asked
from ..records.schema import read_schema

JUDGED = "judged.jsonl"
JUDGE = (
    "Two texts describe the same video. How well does the second say what the first says? Facts count, not wording or "
    "language. Answer with one number from 0 (nothing right) to 10 (all of it, and nothing wrong), and nothing else.\n\n"
    "First:\n{right}\n\nSecond:\n{said}"
)
RECORDS, REPORT, PAGE = "records.jsonl", "report.json", "report.html"


def add_score(commands: Any) -> None:
    """Add the command's options."""
    scoring = commands.add_parser(
        "score",
        help="judge answers that are there",
        description="Judges files of answers with their right ones: what `lmf-video infer --data … --out` writes, and "
        "LLaMA-Factory's generated_predictions.jsonl. Several are compared, each with the first.",
    )
    scoring.add_argument("answers", nargs="+", help="FILE or NAME=FILE")
    add_judging(scoring)
    scoring.set_defaults(run=score)


def add_judging(parser: argparse.ArgumentParser) -> None:
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
        help="what tells the recording that a clip is of: file (default), folder, a regular expression for its path, or a .json "
        "file, {clip: recording}",
    )
    group.add_argument(
        "--judge",
        metavar="ADDRESS",
        help="an OpenAI-compatible address (http://host/v1#NAME) of a model that says how well free texts mean the same",
    )
    group.add_argument("--draw", type=int, default=0, help="seed of what is drawn at random (default 0)")
    group.add_argument(
        "--gate",
        type=Path,
        metavar="REPORT",
        help="an earlier report.json: exit with 1 if the last model is worse than its last one by more than chance allows",
    )


def source_of(rule: str) -> str | dict[str, str]:
    """The rule, or what the file that it names says.

    Raises:
        ValueError: if that file is not an object of texts.
    """
    if not rule.endswith(".json"):
        return rule
    if not Path(rule).is_file():
        raise ValueError(f"--source: no file {rule}")
    try:
        value = json.loads(Path(rule).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--source: {rule}: not JSON ({error})") from error
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise ValueError(f'--source: {rule}: an object is needed, {{"wzry/4/1.mp4": "match 4", …}}')
    return value


def score(options: argparse.Namespace) -> int:
    """Judge and compare answers that are there.

    Returns:
        1 if the gate is closed, else 0.
    """
    files = [(name, answer_lines(Path(file))) for name, file in map(named, options.answers)]
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
        answers[new_name(name, answers)] = answers_of(lines, asked, name)
    return conclude(examples, answers, options.out or Path("output/eval"), options)


def named(word: str) -> tuple[str, str]:
    """NAME=PATH, or a path by its last folder's or file's name."""
    name, given, path = word.partition("=")
    if given and "/" not in name:
        return name, path
    return Path(word.rpartition("#")[2] if is_address(word) else word).name.removesuffix(".jsonl"), word


def new_name(name: str, answers: dict[str, Any]) -> str:
    if name in answers:
        raise ValueError(f"two models are called {name}; give them names: NAME=…")
    return name


def answer_lines(file: Path) -> list[dict[str, Any]]:
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


def answers_of(lines: Sequence[dict[str, Any]], asked: Sequence[Asked], name: str) -> list[str | None]:
    """The answers to questions: by their sources, or one line for each where lines have none."""
    texts = [line.get("answer", line.get("predict")) for line in lines]
    if all("source" in line for line in lines):
        by_source = {line["source"]: text for line, text in zip(lines, texts, strict=True)}
        if not any(each.source in by_source for each in asked):  # the same file may be named from another folder
            tails = {re.split(r"[/\\]", source)[-1]: text for source, text in by_source.items()}
            by_source = {
                each.source: tails[tail] for each in asked if (tail := re.split(r"[/\\]", each.source)[-1]) in tails
            }
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


def conclude(
    examples: Sequence[Example],
    answers: dict[str, list[str | None]],
    out: Path,
    options: argparse.Namespace,
    strips: Sequence[Sequence[Strip]] = (),
    played: Sequence[Sequence[str]] = (),
) -> int:
    """Write the report, print it, and look at the gate."""
    schema = read_schema(options.fits) if options.fits is not None else None
    judging = {"source": source_of(options.source), "schema": schema, "texts": options.text, "seed": options.draw}
    out.mkdir(parents=True, exist_ok=True)
    if options.judge is not None:
        judging["opinions"] = _opinions(options.judge, examples, answers, out / JUDGED, options.text)
    report = make_report(examples, answers, by=options.by, **judging)
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


def _opinions(
    address: str,
    examples: Sequence[Example],
    answers: dict[str, list[str | None]],
    file: Path,
    texts: Sequence[str],
) -> dict[tuple[str, str], float]:
    """What a judge thinks of each free text, asked once and kept in a file.

    Raises:
        ValueError: if it does not answer with a number from 0 to 10.
    """
    from ..model.decoding import Decoding
    from ..model.served import ServedModel

    labels = [example.label for example in examples]
    fields = fields_of([read_label(label) for label in labels], texts)
    pairs = sorted(set().union(*(text_pairs(labels, said, fields) for said in answers.values())))
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    known = {(line["right"], line["said"]): line["opinion"] for line in lines if line["judge"] == address}
    left = [pair for pair in pairs if pair not in known]
    if left:
        judge = ServedModel(address)
        questions = [
            Conversation([(USER, JUDGE.format(right=right, said=said)), (ASSISTANT, "?")]) for right, said in left
        ]
        decoding = Decoding(max_new_tokens=16)
        with file.open("a", encoding="utf-8") as kept, tqdm(total=len(left), unit=" texts", desc="Judging") as bar:
            for number, answer in judge.ask_many(questions, decoding, None):
                if isinstance(answer, Exception):
                    raise ValueError(f"--judge: {answer}") from answer
                found = re.search(r"\b(10|\d)(?:\.\d+)?\b", answer)
                if found is None:
                    raise ValueError(f"--judge: a number from 0 to 10 was asked for; {address} says {answer[:80]!r}")
                known[left[number]] = opinion = min(1.0, float(found[0]) / 10)
                right, said = left[number]
                line = {"judge": address, "right": right, "said": said, "opinion": opinion}
                kept.write(json.dumps(line, ensure_ascii=False) + "\n")
                bar.update()
    return {pair: known[pair] for pair in pairs}


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


def _plain(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else ""
