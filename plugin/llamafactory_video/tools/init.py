"""`lmf-video init`: a folder to start from: recipes, dataset_info.json, a small model and clips to try them with."""

import json
import shutil
from pathlib import Path
from typing import Any

_CLIPS = 16


def init(folder: Path) -> None:
    """Write what is not there yet; what is there is kept as it is.

    Args:
        folder: gets recipes/, dataset_info/, data/ with the records of an example, and tiny/, a model of random weights.
    """
    from ..demo.game import all_scenes, record, write_clip
    from ..demo.tiny_model import save_tiny_model
    from ..host.known import shipped

    kept, written = [], []

    def is_new(path: Path) -> bool:
        (kept if path.exists() else written).append(path)
        return not path.exists()

    for part in ("recipes", "dataset_info"):
        for file in shipped(part):
            path = folder / part / file.name
            if is_new(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, path)
    scenes = all_scenes()
    clips = {number: f"example/{number:05d}.mp4" for number in range(0, len(scenes), len(scenes) // _CLIPS)}
    records = folder / "data" / "example.json"
    if is_new(records):
        (folder / "data" / "example").mkdir(parents=True, exist_ok=True)
        for number, name in clips.items():
            write_clip(folder / "data" / name, number, scenes[number])
        examples = [record(name, scenes[number]) for number, name in clips.items()]
        records.write_text(json.dumps(examples, ensure_ascii=False, indent=1), encoding="utf-8")
    if is_new(folder / "tiny"):
        save_tiny_model(folder / "tiny")
    for path in written:
        print(f"written  {path}")
    for path in kept:
        print(f"kept     {path}, which was there")
    inside = "" if folder.resolve() == Path.cwd() else f"cd {folder}\n  "
    print(
        f"\nTry it, on a CPU in a minute:\n  {inside}llamafactory-cli train recipes/wzry_smoke.yaml\n"
        "Your own clips belong into data/, their records into data/wzry.json (dataset_info/README.md); then\n"
        "  llamafactory-cli train recipes/wzry_smoke.yaml dataset=wzry"
    )


def add_init(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser(
        "init",
        help="write recipes, dataset_info.json, a small model and an example data set into a folder",
        description="Writes recipes, dataset_info.json, a model of random weights and a few clips with their records into a folder, "
        "to start from. What is there already is kept.",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("."), help="the folder (default: this one)")
    parser.set_defaults(run=lambda options: init(options.folder))
