"""`lmf-video init`, and the recipe that tries it, as from an installed package."""

import json
import tomllib
from pathlib import Path

from processes import run

ROOT = Path(__file__).parents[1]


def test_a_folder_to_start_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run("lmf-video", "init", "here")
    assert first.returncode == 0, first.stderr
    here = tmp_path / "here"
    for part in ("recipes", "dataset_info"):
        for file in (ROOT / part).iterdir():
            assert (here / part / file.name).read_bytes() == file.read_bytes()
    assert len(json.loads((here / "data/example.json").read_text(encoding="utf-8"))) >= 8
    own = here / "recipes/wzry_smoke.yaml"
    own.write_text(own.read_text(encoding="utf-8") + "seed: 7\n", encoding="utf-8")
    second = run("lmf-video", "init", "here")
    assert "written" not in second.stdout and "kept     here/tiny, which was there" in second.stdout
    assert own.read_text(encoding="utf-8").endswith("seed: 7\n")

    monkeypatch.chdir(here)
    checked = run("lmf-video", "check", "recipes/wzry_smoke.yaml")
    assert checked.returncode == 0 and "records that cannot be trained on: 0" in checked.stdout
    trained = run("llamafactory-cli", "train", "recipes/wzry_smoke.yaml", "max_steps=4", "logging_steps=1")
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert "No GPU is found: this runs on the CPU in float32, without bf16." in trained.stdout + trained.stderr
    log = json.loads((here / "output/wzry_smoke/trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    clip = next((here / "data/example").glob("*.mp4"))
    asked = run(
        "lmf-video",
        "infer",
        "--model",
        "output/wzry_smoke",
        "--video",
        str(clip),
        "--prompt",
        "看",
        "--max-new-tokens",
        "4",
    )
    assert asked.returncode == 0, asked.stderr[-3000:]


def test_the_wheel_holds_every_package_and_file():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        "llamafactory_video",
        *(f"llamafactory_video.{f.parent.name}" for f in (ROOT / "plugin").glob("*/*/__init__.py")),
    }
    mapped = {name: ROOT / folder for name, folder in tool["package-dir"].items() if name}
    assert set(tool["packages"]) == folders | set(mapped)
    for name, folder in mapped.items():
        held = {file for pattern in tool["package-data"][name] for file in folder.glob(pattern)}
        assert held == {file for file in folder.iterdir() if file.is_file()}
