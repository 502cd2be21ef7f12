"""The command `lmf-video`: what LLaMA-Factory's own command has no word for."""

import argparse
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

_BATCH = 1000  # records in hand at a time


def check(recipe: Path, overrides: list[str]) -> int:
    """Read a recipe's data as training would, and tell what the model will be shown of it.

    Returns:
        How many records cannot be trained on.
    """
    from .data.loader import DatasetError
    from .hooks import recipe_data

    wrong, parts, encoder = recipe_data(recipe, overrides)
    cutoff, encoder.cutoff_len = encoder.cutoff_len, sys.maxsize  # all lengths are wanted, too long ones as well
    pads = {encoder.processor.image_token_id, encoder.processor.video_token_id}

    def measure(row: dict[str, Any]) -> tuple[int, int] | str:
        try:
            ids = encoder.encode(row)["input_ids"]
        except DatasetError as error:
            return str(error)
        visual = sum(token in pads for token in ids)
        if len(ids) > cutoff:
            return f"{row.get('_source', 'a record')}: {len(ids)} tokens, {visual} of them visual, are more than cutoff_len {cutoff}"
        return len(ids), visual

    if not parts and not wrong:
        raise ValueError(f"{recipe} names no data set; give a training recipe")
    for name, part in parts.items():
        found: list[tuple[int, int] | str] = []
        with ThreadPoolExecutor() as pool, tqdm(total=len(part), unit=" records", desc=f"Checking {name}") as bar:
            for start in range(0, len(part), _BATCH):
                for size in pool.map(measure, part.select(range(start, min(start + _BATCH, len(part))))):
                    found.append(size)
                    bar.update()
        sizes = [size for size in found if not isinstance(size, str)]
        problems = [problem for problem in found if isinstance(problem, str)]
        if sizes:
            example = encoder.encode(part[next(i for i, size in enumerate(found) if not isinstance(size, str))])
            print(f"\n{name}, as the model sees it:\n{encoder.describe(example)}")
        print(f"\n{name}: {len(part)} records")
        for title, column in (("tokens", 0), ("visual tokens", 1)):
            numbers = [size[column] for size in sizes] or [0]
            print(
                f"  {title + ' of a record':<28} least {min(numbers):>6}   "
                f"median {statistics.median(numbers):>8.0f}   most {max(numbers):>6}"
            )
        print(f"  cutoff_len {cutoff}; records that cannot be trained on: {len(problems)}")
        for problem in problems:
            print(f"    {problem}")
        wrong += len(problems)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(prog="lmf-video", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser(
        "check",
        help="read a recipe's data without training: wrong records, unreadable clips, lengths",
        description="Reads every record and probes every clip of a training recipe, and says what the model will be "
        "shown: an example, the lengths in tokens, and each record that cannot be trained on.",
    )
    checking.add_argument("recipe", type=Path, help="a training recipe, such as recipes/wzry_full.yaml")
    checking.add_argument("overrides", nargs="*", help="key=value, as for llamafactory-cli")
    options = parser.parse_args()
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    try:
        sys.exit(1 if check(options.recipe, options.overrides) else 0)
    except (ValueError, OSError, yaml.YAMLError) as error:
        sys.exit(f"lmf-video: {error}")


if __name__ == "__main__":
    main()
