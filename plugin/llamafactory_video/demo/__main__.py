"""python -m llamafactory_video.demo prepare: what `make demo` does before training.

torch and transformers take seconds to import, and are only where they are needed.
"""

import argparse
import shutil
from pathlib import Path

from .game import write_dataset


def prepare(folder: Path, train: int, test: int) -> None:
    """Make the model and the clips; what is there already is kept."""
    write_dataset(folder, train, test)
    if not (folder / "base").exists():
        from .tiny_model import save_tiny_model

        save_tiny_model(folder / "base")
    for checkpoint in (folder / "tuned").glob("checkpoint-*"):
        # Its last file: without it the run was killed while saving, and cannot resume from there.
        if not (checkpoint / "trainer_state.json").exists():
            shutil.rmtree(checkpoint)
    print(f"{folder}: a model of random weights in base/, {train} clips to train and {test} to test in clips/")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m llamafactory_video.demo", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("output/demo"), help="where all of it lies (%(default)s)")
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("prepare", help="make a small model and draw the clips")
    step.add_argument("--train", type=int, default=9600, help="clips to train on (%(default)s)")
    step.add_argument("--test", type=int, default=96, help="clips to keep for the comparison (%(default)s)")
    options = parser.parse_args(arguments)
    prepare(options.folder, options.train, options.test)


if __name__ == "__main__":
    main()
