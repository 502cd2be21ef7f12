"""Run a training recipe on a random model and your own clips, and measure it: loss, step time, GPU memory.

Nothing is downloaded: the model is made at random weights from a folder with Qwen3-VL's config.json and processor
files, and every clip of a folder gets the same kind of record. Example, the run behind the README's table:

    python benchmarks/train_recipe.py recipes/wzry_full_1gpu.yaml --config Qwen3-VL-4B-Instruct/ --clips clips/ \\
        --steps 20 --out bench/ gradient_accumulation_steps=4

Words after the options override the recipe. The number of GPUs is LLaMA-Factory's own choice (NPROC_PER_NODE).
Prints one line a step and a summary, and writes both to OUT/result.json.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import yaml


def make_model(config_dir: Path, folder: Path) -> None:
    """Qwen3-VL at random bf16 weights, with the processor of `config_dir`."""
    from transformers import AutoConfig, AutoProcessor, Qwen3VLForConditionalGeneration

    if (folder / "config.json").is_file():
        return
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration._from_config(
            AutoConfig.from_pretrained(config_dir), dtype=torch.bfloat16
        )
    AutoProcessor.from_pretrained(config_dir).save_pretrained(folder)
    model.save_pretrained(folder)


def make_dataset(clips_dir: Path, folder: Path, records: int) -> None:
    """`records` annotations that go through the clips of a folder in turn."""
    clips = sorted(path.resolve() for path in clips_dir.iterdir() if path.is_file())
    answer = {
        "video_description": "凯从中路出发，先推掉一塔，再和队友在河道会合，打赢了一场团战。",
        "tags": ["游戏直播", "王者荣耀"],
    }
    turns = [
        {"from": "human", "value": "<video>\n描述这个视频并进行打标,使用json输出标签"},
        {"from": "gpt", "value": answer},
    ]
    rows = [{"video": str(clips[i % len(clips)]), "conversations": turns} for i in range(records)]
    (folder / "clips.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    info = {"clips": {"file_name": "clips.json", "formatting": "video_conversation"}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


class MemoryWatch(threading.Thread):
    """The most memory seen in use on any GPU, in GiB, asked of nvidia-smi twice a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0
        self.stopped = threading.Event()

    def run(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.stopped.wait(0.5):
            used = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            self.peak = max(self.peak, *(float(mib) / 1024 for mib in used))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--config", type=Path, required=True, help="folder with config.json and processor files")
    parser.add_argument("--clips", type=Path, required=True, help="folder of video files")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="folder for the result and the log")
    parser.add_argument("--work", type=Path, default=Path("bench_work"), help="folder for the model and the run")
    parser.add_argument("overrides", nargs="*", help="key=value, as for llamafactory-cli")
    options = parser.parse_intermixed_args()
    recipe = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
    for word in options.overrides:
        key, _, value = word.partition("=")
        recipe[key] = yaml.safe_load(value)
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    make_model(options.config, options.work / "model")
    gpus = int(os.environ.get("NPROC_PER_NODE", torch.cuda.device_count() or 1))
    clips_a_step = recipe["per_device_train_batch_size"] * recipe.get("gradient_accumulation_steps", 1) * gpus
    make_dataset(options.clips, options.work, clips_a_step * options.steps)
    run_dir = (options.work / f"run_{options.recipe.stem}").resolve()
    recipe |= {
        "model_name_or_path": str((options.work / "model").resolve()),
        "dataset": "clips",
        "dataset_dir": str(options.work.resolve()),
        "media_dir": str(options.clips.resolve()),
        "output_dir": str(run_dir),
        "max_steps": options.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "plot_loss": False,
        "overwrite_cache": True,
    }
    file = options.work / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")

    watch = MemoryWatch()
    if torch.cuda.is_available():
        watch.start()
    started = time.time()
    with (options.out / f"{options.recipe.stem}.log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "llamafactory.cli", "train", str(file)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        steps: list[dict[str, float]] = []
        for line in process.stdout:
            log.write(line)
            if "'loss':" in line:
                numbers = line[line.index("{'loss'") : line.index("}") + 1].replace("'", '"')
                steps.append({key: float(value) for key, value in json.loads(numbers).items()})
                steps[-1]["second"] = round(time.time() - started, 2)
                print(f"step {len(steps)}: {steps[-1]}", flush=True)
    watch.stopped.set()
    if process.wait() or len(steps) < options.steps:
        tail = (options.out / f"{options.recipe.stem}.log").read_text(encoding="utf-8")[-4000:]
        sys.exit(f"{options.recipe} failed:\n{tail}")
    # The first three steps warm up the workers and the allocator.
    seconds = (steps[-1]["second"] - steps[2]["second"]) / (len(steps) - 3)
    result = {
        "recipe": options.recipe.name,
        "overrides": options.overrides,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "gpus": gpus,
        "clips_a_step": clips_a_step,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "seconds_a_step": round(seconds, 3),
        "clips_a_second": round(clips_a_step / seconds, 2),
        "peak_gpu_gib": round(watch.peak, 1),
    }
    print(json.dumps(result, indent=2))
    (options.out / f"{options.recipe.stem}.json").write_text(json.dumps(result | {"steps": steps}, indent=2))


if __name__ == "__main__":
    main()
