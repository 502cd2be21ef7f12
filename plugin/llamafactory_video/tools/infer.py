"""`lmf-video infer`: asks a model about clips, pictures and texts."""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from ..media import is_address
from ..records.json_text import json_text, read_json
from ..records.question import Asked, clip_argument, clip_files, clip_name, question, read_questions
from .answering import add_answering, decoding_of, load, sampling_of, say, see_followed


def add_infer(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser(
        "infer",
        help="ask a model about clips, pictures and texts",
        description="Asks a model, or a model with adapters, about clips, sampled as it was trained. One question is "
        "answered word by word; of many clips, each is asked alone, several at once, and --out keeps the answers and "
        "resumes where it stopped. A part of a clip, in seconds, is clip.mp4#12.5-20.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="folder of a model or adapter, the name of a model on the hub, or with --out an OpenAI-compatible address, such as http://127.0.0.1:8000/v1#NAME",
    )
    parser.add_argument("--adapter", nargs="+", default=[], help="folders of adapters")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--video", nargs="+", default=[], help="clips, or folders of clips; each is asked alone")
    asked.add_argument("--image", nargs="+", default=[], help="pictures, all shown in each question")
    asked.add_argument("--prompt", action="append", default=[], help="a question; given twice, both are asked")
    asked.add_argument("--system", default="", help="the system prompt")
    asked.add_argument("--together", action="store_true", help="show all clips in one question")
    asked.add_argument("--data", type=Path, help="records (.json, .jsonl or a folder), which hold their own questions")
    asked.add_argument("--media-dir", type=Path, help="folder that paths in records are relative to (default: theirs)")
    told = parser.add_argument_group("what is printed")
    told.add_argument("--json", action="store_true", help="see that each answer is JSON, and print it indented")
    told.add_argument("--explain", action="store_true", help="print what the model is shown, before each answer")
    told.add_argument("--out", type=Path, help="a .jsonl file, one line an answer")
    add_answering(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask, and print or write the answers.

    Returns:
        How many questions have no answer, or with `--json` one that is not JSON.
    """
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}; it must be at least 1")
    see_followed([options.model], options)
    asked = _questions(options)
    decoding = decoding_of(options)
    if is_address(options.model) and (options.out is None or options.explain):
        raise ValueError("a model behind an address answers with --out, and without --explain")
    if options.out is not None:
        return answer_into(options.out, asked, decoding, options)
    model = load(options)
    if len(asked) == 1:
        return _print_one(model, asked[0], decoding, options)
    failed = 0
    for each, answer in _in_order(asked, _answers(model, asked, decoding, options.batch_size)):
        print(f"\n{each.source}")
        failed += _print(model, each, answer, options)
    if failed:
        say(f"{failed} of {len(asked)} have no answer" + (", or one that is not JSON" if options.json else ""))
    return failed


def answer_into(out: Path, asked: Sequence[Asked], decoding: Any, options: argparse.Namespace) -> int:
    """Write an answer to each question into a file; those that an earlier call has written are kept.

    Returns:
        How many questions have no answer, or with `--json` one that is not JSON.
    """
    settings = settings_of(decoding, options)
    digests = [digest_of([*settings, each.conversation]) for each in asked]
    return _write(out, asked, decoding, options, _written(out, asked, digests), digests)


def _questions(options: argparse.Namespace) -> list[Asked]:
    """What is asked.

    Raises:
        ValueError: if options contradict each other, or name no file.
    """
    if options.data is not None:
        taken = [name for name in ("video", "image", "prompt", "system") if getattr(options, name)]
        if taken:
            raise ValueError(f"--data stands beside --{taken[0]}; records hold their own clips and questions")
        return list(read_questions(options.data, options.media_dir))
    if not options.prompt:
        raise ValueError('no question: give --prompt "…", or --data with records that hold their own')
    clips: list[Any] = []
    for name in options.video:
        clips += [str(file) for file in clip_files(Path(name))] if Path(name).is_dir() else [clip_argument(name)]
    groups = [clips] if options.together or not clips else [[clip] for clip in clips]
    names = {id(group): tuple(clip_name(clip) for clip in group) for group in groups}
    asked = []
    for group in groups:
        for number, prompt in enumerate(options.prompt, start=1):
            shown = (*names[id(group)], *options.image)
            source = ", ".join(shown) or "a text"
            if len(options.prompt) > 1:
                source += f", question {number}"
            try:
                asked.append(Asked(source, question(prompt, group, options.image, options.system), shown))
            except ValueError as error:
                asked.append(Asked(source, error, shown))
    if len(asked) == 1 and isinstance(asked[0].conversation, ValueError):
        raise asked[0].conversation
    return asked


def _answers(
    model: Any, asked: Sequence[Asked], decoding: Any, batch_size: int | None
) -> Iterator[tuple[int, str | Exception]]:
    """Answers with the numbers of their questions, as they are done."""
    right = [i for i, each in enumerate(asked) if not isinstance(each.conversation, ValueError)]
    yield from ((i, each.conversation) for i, each in enumerate(asked) if isinstance(each.conversation, ValueError))
    for number, answer in model.ask_many([asked[i].conversation for i in right], decoding, batch_size, say):
        yield right[number], answer


def _in_order(
    asked: Sequence[Asked], answers: Iterator[tuple[int, str | Exception]]
) -> Iterator[tuple[Asked, str | Exception]]:
    waiting: dict[int, str | Exception] = {}
    at = 0
    for number, answer in answers:
        waiting[number] = answer
        while at in waiting:
            yield asked[at], waiting.pop(at)
            at += 1


def _explain(model: Any, each: Asked) -> None:
    from ..prompt.shown import shown_text

    print(shown_text(model.encoder.encode(each.conversation), model.encoder))


def _print_one(model: Any, each: Asked, decoding: Any, options: argparse.Namespace) -> int:
    if options.explain:
        _explain(model, each)
    pieces = []
    for piece in model.stream(each.conversation, decoding):
        pieces.append(piece)
        if not options.json:
            print(piece, end="", flush=True)
    if options.json:
        return _print_json("".join(pieces))
    print()
    return 0


def _print(model: Any, each: Asked, answer: str | Exception, options: argparse.Namespace) -> int:
    if isinstance(answer, Exception):
        print(f"error: {answer}")
        return 1
    if options.explain:
        _explain(model, each)
    if options.json:
        return _print_json(answer)
    print(answer)
    return 0


def _print_json(answer: str) -> int:
    value, problems = read_json(answer)
    print(answer if problems else json_text(value, 2))
    if problems:
        say(f"this answer is not JSON: {problems[0]}")
    return 1 if problems else 0


# --- Many answers, in a file ------------------------------------------------------------------------------------------


def _weights(model: str) -> list[Any]:
    """What changes when a folder's model is trained again."""
    files = sorted(Path(model).glob("*.safetensors"))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def settings_of(decoding: Any, options: argparse.Namespace) -> list[Any]:
    """All but the question that an answer depends on: another model, weights that were trained again, other settings."""
    settings = [options.model, options.adapter, options.dtype, options.load_in_4bit, decoding, sampling_of(options)]
    return [
        *settings,
        options.sampled_as,
        options.send,
        *(_weights(name) for name in (options.model, *options.adapter)),
    ]


def digest_of(parts: list[Any]) -> str:
    """A short name for values that are written alike."""
    return xxhash.xxh3_64_hexdigest(repr(parts).encode())


def _written(out: Path, asked: Sequence[Asked], digests: Sequence[str]) -> list[dict[str, Any]]:
    """The lines that an earlier call has written; questions that failed then are asked again.

    Raises:
        ValueError: if one is the answer of another model, to another prompt, or of other settings.
    """
    wanted = {each.source: digest for each, digest in zip(asked, digests, strict=True)}
    written = []
    lines = out.read_bytes().split(b"\n") if out.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            source, digest = value["source"], value["asked"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                continue  # cut off when the call was killed
            raise ValueError(f"{out}, line {number}: no answer of `lmf-video infer`; give another --out") from error
        if "answer" not in value and source in wanted:
            continue
        if wanted.get(source, digest) != digest:
            raise ValueError(
                f"{out}, line {number}: the answer to {source} is of another model, prompt or settings; give another --out, "
                "or remove this one"
            )
        written.append(value)
    return written


def _write(
    out: Path,
    asked: Sequence[Asked],
    decoding: Any,
    options: argparse.Namespace,
    written: Sequence[dict[str, Any]],
    digests: Sequence[str],
) -> int:
    """Write a line for each question; at the end they stand in the questions' order, after those of other questions."""
    lines = {line["source"]: line for line in written}
    left = [(each, digest) for each, digest in zip(asked, digests, strict=True) if each.source not in lines]
    if len(left) < len(asked):
        say(f"{len(asked) - len(left)} of {len(asked)} are answered in {out} already.")
    if left:
        model = load(options)
        out.parent.mkdir(parents=True, exist_ok=True)
        _replace(out, lines.values())
        began = time.monotonic()
        with out.open("a", encoding="utf-8") as file, tqdm(total=len(left), unit=" questions") as bar:
            for number, answer in _answers(model, [each for each, _ in left], decoding, options.batch_size):
                each, digest = left[number]
                line = lines[each.source] = _line(each, answer, digest)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                bar.update()
        seconds = time.monotonic() - began
        say(f"{len(left)} questions in {seconds:.1f} s, {len(left) / seconds:.2f} a second")
    here = {each.source: lines[each.source] for each in asked}
    _replace(out, [*(line for source, line in lines.items() if source not in here), *here.values()])
    wrong = [line for line in here.values() if "error" in line]
    unread = [line for line in here.values() if options.json and "answer" in line and read_json(line["answer"])[1]]
    for line in wrong:
        say(f"{line['source']}: {line['error']}")
    print(f"{len(here) - len(wrong)} answers in {out}; {len(wrong)} questions have none.")
    if options.json:
        print(f"{len(unread)} answers are not JSON.")
    return len(wrong) + len(unread)


def _line(each: Asked, answer: str | Exception, digest: str) -> dict[str, Any]:
    line: dict[str, Any] = {"source": each.source, "shown": list(each.shown)}
    line |= {"error": str(answer)} if isinstance(answer, Exception) else {"answer": answer}
    if each.label is not None:
        line["label"] = each.label
    return line | {"asked": digest}


def _replace(out: Path, lines: Any) -> None:
    partial = out.with_name(f"{out.name}.unfinished")
    partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    os.replace(partial, out)
