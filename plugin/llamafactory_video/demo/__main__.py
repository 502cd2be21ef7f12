"""python -m llamafactory_video.demo prepare|report: what `make demo` does before and after training."""

import argparse
from pathlib import Path


def prepare(folder: Path, train: int, test: int) -> None:
    """Make the model and the clips; what is there already is kept."""
    from . import game

    game.write_dataset(folder, train, test)
    if not (folder / "base").exists():
        from .tiny_model import save_tiny_model

        save_tiny_model(folder / "base")
    print(f"{folder}: a model of random weights in base/, {train} clips to train and {test} to test in clips/")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llamafactory_video.demo", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("output/demo"), help="where all of it lies (%(default)s)")
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("prepare", help="make a small model and draw the clips")
    step.add_argument("--train", type=int, default=9600, help="clips to train on (%(default)s)")
    step.add_argument("--test", type=int, default=96, help="clips to keep for the report (%(default)s)")
    steps.add_parser("report", help="compare the trained model with the untrained one")
    options = parser.parse_args()
    if options.step == "prepare":
        prepare(options.folder, options.train, options.test)
    else:
        from .report import write_report

        write_report(options.folder)


if __name__ == "__main__":
    main()
