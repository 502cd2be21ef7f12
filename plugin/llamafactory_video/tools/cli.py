"""The command `lmf-video`: what LLaMA-Factory's own command has no word for."""

import argparse
import json
import os
import re
import shlex
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from .convert import add_convert
from .evaluate import add_eval
from .export import add_export
from .infer import add_infer
from .init import add_init
from .score import add_score

_WRITE = "write the records that can be trained on there, one on each line, as they stand in their files"


def check(recipe: Path, overrides: list[str], write: Path | None = None) -> int:
    """Read a recipe's data as training would, and tell what the model will be shown of it.

    Args:
        write: where the records that can be trained on are written.

    Returns:
        How many records stop training: those that cannot be trained on and may not be left out.
    """
    from ..host.recipe import recipe_data
    from ..prompt.lengths import measure_all
    from ..prompt.shown import few_tokens

    data = recipe_data(recipe, overrides)
    parts, encoder = data.parts, data.encoder
    if not parts and not data.unread:
        raise ValueError(f"{recipe} names no data set; give a training recipe")
    problems: dict[str, dict[int, str]] = {}
    for name, part in parts.items():
        found = list(measure_all(part, encoder, range(len(part)), None))
        sizes = [measured for measured in found if measured.tokens]
        problems[name] = {number: measured.problem for number, measured in enumerate(found) if measured.problem}
        changes = [measured.change for measured in found if measured.change]
        if any(not measured.problem for measured in found):
            example = encoder.encode(part[next(i for i, measured in enumerate(found) if not measured.problem)])
            print(f"\n{name}, as the model sees it:\n{encoder.describe(example)}")
            if note := few_tokens(example, encoder):
                print(f"\n{note}")
        print(f"\n{name}: {len(part)} records")
        for title, numbers in (
            ("tokens", [measured.tokens for measured in sizes]),
            ("visual tokens", [measured.visual for measured in sizes]),
        ):
            if not numbers:
                break
            print(
                f"  {title + ' of a record':<28} least {min(numbers):>6}   "
                f"median {statistics.median(numbers):>8.0f}   most {max(numbers):>6}"
            )
        if changes:
            print(f"  records whose clips are made smaller to fit: {len(changes)}")
            print("\n".join(f"    {change}" for change in changes))
        print(f"  cutoff_len {encoder.cutoff_len}; records that cannot be trained on: {len(problems[name])}")
        print("\n".join(f"    {problem}" for problem in problems[name].values()), end="\n" if problems[name] else "")
    return _concluded(data, problems, write)


def _concluded(data: Any, problems: dict[str, dict[int, str]], write: Path | None) -> int:
    """What follows from problems of records, by data set and number: told, and how many stop training."""
    from ..records.report import may_be_left_out

    wrong = data.wrong
    for name, found in problems.items():
        if found and may_be_left_out(len(found), len(data.parts[name]), data.most_wrong):
            print(f"{name}: `skip_wrong_records` leaves out {len(found)} of {len(data.parts[name])} records.")
        else:
            wrong += len(found)
    if write is not None:
        _write_clean(data, problems, write)
    if wrong:
        print(f"\n{wrong} records in all cannot be trained on; they are listed above.")
    if data.unread:
        print(f"\nNothing of {', '.join(data.unread)} can be trained on.")
    return 0 if write else wrong + len(data.unread)


def _write_clean(data: Any, problems: dict[str, dict[int, str]], write: Path) -> None:
    """Write the records of a recipe's one data set that can be trained on, as they stand in its files."""
    from ..records.files import annotation_files, read_records, write_records

    if len(data.parts) != 1 or data.unread or not data.files:
        raise ValueError(
            f"--write takes one data set of a file or a folder; {', '.join(data.parts) or 'none'} is named; add dataset=NAME "
            "and eval_dataset=null"
        )
    (name, part), files = next(iter(data.parts.items())), annotation_files(next(iter(data.files.values())))
    sources = enumerate(part.table["_source"])
    good = {re.sub(r" \(line \d+\)$", "", source) for number, source in sources if number not in problems[name]}
    records = (record for file in files for record in read_records(file))
    clean = [record.value for record in records if f"{record.file}, record {record.number}" in good]
    if len(clean) < len(good):
        raise ValueError(
            f"--write: the records of {files[0]} do not lie in it as JSON, so they cannot be written again"
        )
    count = write_records(write, clean, files)
    print(f"{write}: {count} records of {name}, each on a line; register it in dataset_info.json")


def build_cache(recipe: Path, overrides: list[str], jobs: int | None, write: Path | None = None) -> int:
    """Decode every clip of a recipe into the frame cache, but those that are there already; and see that pictures are whole.

    Args:
        jobs: processes that decode.
        write: where the records that can be trained on are written.

    Returns:
        How many records stop training.
    """
    from ..host.recipe import recipe_data
    from ..prompt.lengths import store_all
    from ..video.cache import GIB

    data = recipe_data(recipe, overrides)
    cache = data.encoder.reader.cache
    if cache is None:
        raise ValueError("there is no frame cache: video_cache is false, or the disk is nearly full")
    problems: dict[str, dict[int, str]] = {}
    notes: list[str] = []
    decoded = found = pictures = 0
    for name, part in data.parts.items():
        problems[name] = {}
        for number, stored in enumerate(store_all(part, data.encoder, jobs, f"Decoding {name}")):
            decoded, found, pictures = decoded + stored.decoded, found + stored.found, pictures + stored.pictures
            if stored.problem:
                problems[name][number] = stored.problem
            notes += stored.notes
    size = cache.size()
    lines = [problem for part in problems.values() for problem in part.values()]
    seen = f"{pictures} pictures read, " if pictures else ""
    print(
        f"{decoded} clips decoded, {found} were there already, {seen}{len(lines)} records with a clip or picture that cannot be "
        "shown."
    )
    print("\n".join(f"  {line}" for line in lines), end="\n" if lines else "")
    if notes:
        print("Used as far as they can be decoded:")
        print("\n".join(f"  {note}" for note in notes))
    print(f"{cache.folder}: {size} of at most {cache.limit / GIB:.1f} GiB")
    if size.bytes > 0.75 * cache.limit:
        print(
            "The cache is nearly full, and evicts what was used longest ago. For larger data sets raise video_cache_gb."
        )
    return _concluded(data, problems, write)


def cache_folder(recipe: Path | None, overrides: list[str]) -> Path:
    """The folder of a recipe's frame cache, or the usual one."""
    from ..video.cache import default_folder

    keys = (yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe else None) or {}
    if not isinstance(keys, dict):
        raise ValueError(f"{recipe} is no recipe: lines of `key: value` are needed")
    keys |= dict(word.split("=", 1) for word in overrides if "=" in word)
    folder = keys.get("video_cache_dir")
    return Path(folder).expanduser() if folder else default_folder()


def show_cache(folder: Path, clear: bool) -> None:
    """Print what a frame cache holds, and remove it if asked to."""
    from ..video.cache import FrameCache

    cache = FrameCache(folder)
    size = cache.clear() if clear else cache.size()
    done = "removed" if clear else "holds"
    print(f"{folder} {done} {size}, and what is known of {size.files} files")


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        return False


def map_settings(words: list[str], kind: str | None, clip: str | None, as_json: bool) -> None:
    """Print what other tools' settings are called here; see map.py."""
    from ..video.probe import probe
    from ..video.sampling import ClipInfo
    from .command_line import MappingError
    from .map import EXAMPLE, read_as_recipe, remarks, result_text

    info, text = EXAMPLE, words[0] if len(words) == 1 else shlex.join(words)
    if text == "-":
        text = sys.stdin.read()
    elif len(words) == 1 and _is_file(text):
        try:
            text = Path(text).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise MappingError(f"{text} is not a text file; an example clip goes behind --clip") from error
    elif len(words) == 1 and not re.search(r"=|^--|^\s*[\[{]|\s", text):
        raise MappingError(f"no file {text}")
    if clip is not None:
        numbers = re.fullmatch(r"([\d.]+)s@([\d.]+),(\d+)x(\d+)", clip)
        if numbers:
            seconds, rate, width, height = float(numbers[1]), float(numbers[2]), int(numbers[3]), int(numbers[4])
            info = ClipInfo(round(seconds * rate), rate, seconds, height, width)
        elif Path(clip).is_file():
            info = probe(clip)[0].info
        else:
            raise MappingError(f"--clip {clip}: no such file, and not of the form 15s@30,1280x720")
    report = read_as_recipe(text, kind, info)
    if clip is not None and Path(clip).is_file():
        counted = f"{info.num_frames} frames, counted from its packets; other tools believe the file's header"
        report["notes"].append(("--clip", counted))
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
        return
    print(result_text(report))
    for line in remarks(report, info):
        print(f"# {line}")


class _Versions(argparse.Action):
    """Prints those of this package and of those that it works with, a line each."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for name in ("llamafactory-video", "llamafactory", "transformers", "torch", "av"):
            print(name, version(name))
        parser.exit()


def main() -> int | None:
    """The command; what reads its output may have seen enough before its end, as `head` does."""
    try:
        try:
            return _main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the very end
        return 141  # as a shell tells of SIGPIPE


def _main() -> int | None:
    parser = argparse.ArgumentParser(prog="lmf-video", description=__doc__)
    parser.add_argument("--version", action=_Versions, nargs=0, help="show versions, this program's first, and exit")
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser(
        "check",
        help="read a recipe's data without training: wrong records, unreadable clips, lengths",
        description="Reads every record and probes every clip of a training recipe, and says what the model will be "
        "shown: an example, the lengths in tokens, and each record that cannot be trained on.",
    )
    checking.add_argument("recipe", type=Path, help="a training recipe, such as recipes/wzry_full.yaml")
    checking.add_argument("overrides", nargs="*", default=[], help="key=value, as for llamafactory-cli")
    checking.add_argument("--write", type=Path, metavar="FILE", help=_WRITE)
    mapping = commands.add_parser(
        "map",
        help="settings of the official trainer, qwen-vl-utils or ms-swift as lines of a recipe",
        description="Reads the official trainer's command, a qwen-vl-utils message, ms-swift's environment variables or "
        "a LLaMA-Factory YAML, and prints what means the same, what it makes of an example clip, and what has no "
        "counterpart or means something else than its name suggests.",
    )
    mapping.add_argument("input", nargs="+", help="a file, - for standard input, or flags and variables after --")
    mapping.add_argument("--from", dest="kind", choices=("command", "message", "environment", "recipe"))
    mapping.add_argument(
        "--clip", help="the example: a video file, or such as 15s@30,1280x720 (default 15s@60,1280x720)"
    )
    mapping.add_argument("--json", action="store_true", help="print all of it as one JSON object")
    caching = commands.add_parser(
        "cache",
        help="decode a recipe's clips before training; look at the cache of frames, or empty it",
        description="Training keeps decoded frames on disk by itself. `build` decodes all clips of a recipe ahead, on a "
        "machine without a GPU, say; interrupted and started again, it continues where it was. `info` tells what is there, "
        "`clear` removes it.",
    )
    caching.add_argument("action", choices=("build", "info", "clear"))
    caching.add_argument("recipe", type=Path, nargs="?", help="a training recipe; without one, the usual cache")
    caching.add_argument("overrides", nargs="*", default=[], help="key=value, as for llamafactory-cli")
    caching.add_argument("--jobs", type=int, help="processes that decode (default: as many as there are cores)")
    caching.add_argument("--write", type=Path, metavar="FILE", help=f"with build: {_WRITE}")
    add_convert(commands)
    add_eval(commands)
    add_score(commands)
    add_infer(commands)
    add_init(commands)
    add_export(commands)
    options, more = parser.parse_known_args()
    if any("=" not in word or word.startswith("-") for word in more) or (more and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # argparse takes those alone that stand together
        options.overrides = [*options.overrides, *more]
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    try:
        if options.command == "map":
            return map_settings(options.input, options.kind, options.clip, options.json)
        if hasattr(options, "run"):
            sys.exit(1 if options.run(options) else 0)
        if wrong := [word for word in options.overrides if "=" not in word]:
            raise ValueError(f"{wrong[0]} is no override; write key=value, such as dataset=wzry")
        if options.recipe is not None and not options.recipe.is_file():
            raise ValueError(f"no file {options.recipe}; give a recipe, such as recipes/wzry_full.yaml")
        if options.command == "check":
            sys.exit(1 if check(options.recipe, options.overrides, options.write) else 0)
        if options.action == "build":
            if options.recipe is None:
                raise ValueError("cache build needs a recipe, which says how its clips are sampled")
            sys.exit(1 if build_cache(options.recipe, options.overrides, options.jobs, options.write) else 0)
        show_cache(cache_folder(options.recipe, options.overrides), clear=options.action == "clear")
    except BrokenPipeError:
        raise
    except (ValueError, OSError, yaml.YAMLError) as error:
        sys.exit(f"lmf-video: {error}")
    except KeyboardInterrupt:
        print("lmf-video: interrupted; finished work is kept, and the next call continues from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
