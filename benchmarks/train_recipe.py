"""Run a training recipe on a random model and your own clips, and measure it: loss, speed, GPU memory.

Nothing is downloaded: the model is made at random weights from a folder with Qwen3-VL-4B's config.json and processor
files, and every clip of a folder gets the same kind of record. Example, the run behind the README's table:

    python benchmarks/train_recipe.py recipes/wzry_full_1gpu.yaml --config Qwen3-VL-4B-Instruct/ --clips clips/ \\
        --steps 20 --out bench/ gradient_accumulation_steps=4

Words after the options override the recipe. `--model 8B` makes another size of Qwen3-VL of the config. The number of
GPUs is LLaMA-Factory's own choice (NPROC_PER_NODE). The run is ended after its last step; with `--save` it writes the
trained model first. Prints one line a step and a summary, and writes both to OUT/<recipe>.json. Model, log and trained
model are in WORK.
"""

import argparse
import ast
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

# What the published sizes of Qwen3-VL change in the config of the 4B model.
SIZES: dict[str, dict[str, Any]] = {
    "2B": {
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
        },
        "vision_config": {"out_hidden_size": 2048},
    },
    "4B": {},
    "8B": {
        "text_config": {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
        "vision_config": {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        "tie_word_embeddings": False,
    },
}
WARM_UP = 3  # steps that start the workers and fill the allocator


# --- What is trained, and on what ------------------------------------------------------------------------------------


def make_model(config_dir: Path, folder: Path, size: str) -> None:
    """Qwen3-VL at random bf16 weights, with the processor of `config_dir`; made once for all runs."""
    if folder.is_dir():
        return
    # A process of its own: what it holds of the GPU would count as the run's.
    process = multiprocessing.get_context("spawn").Process(target=_make_model, args=(config_dir, folder, size))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{folder} could not be made")


def _make_model(config_dir: Path, folder: Path, size: str) -> None:
    import torch
    from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = json.loads((config_dir / "config.json").read_text(encoding="utf-8"))
    for key, value in SIZES[size].items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3VLForConditionalGeneration._from_config(Qwen3VLConfig.from_dict(config), dtype=torch.bfloat16)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    AutoProcessor.from_pretrained(config_dir).save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    unfinished.rename(folder)


def make_dataset(clips_dir: Path, folder: Path, records: int, mixed: bool = False) -> None:
    """`records` annotations that go through the clips of a folder in turn.

    Args:
        mixed: a text, a picture and a picture beside a clip take turns with the clips.
    """
    clips = sorted(path.resolve() for path in clips_dir.iterdir() if path.is_file())
    picture = folder.resolve() / "picture.png"
    Image.effect_noise((640, 360), 80).convert("RGB").save(picture)
    answer = {
        "video_description": "凯从中路出发，先推掉一塔，再和队友在河道会合，打赢了一场团战。",
        "tags": ["游戏直播", "王者荣耀"],
    }

    def record(number: int) -> dict[str, Any]:
        clip, image = {"video": str(clips[number % len(clips)])}, {"image": str(picture)}
        kinds = [("<video>", clip), ("", {}), ("<image>", image), ("<image><video>", clip | image)]
        marks, shown = kinds[number % 4 if mixed else 0]
        question = {"from": "human", "value": f"{marks}描述这个视频并进行打标,使用json输出标签"}
        return {**shown, "conversations": [question, {"from": "gpt", "value": answer}]}

    rows = [record(i) for i in range(records)]
    (folder / "clips.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    info = {"clips": {"file_name": "clips.json", "formatting": "video_conversation"}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


# --- A run -----------------------------------------------------------------------------------------------------------


class MemoryWatch(threading.Thread):
    """The most memory seen in use on any GPU, in GiB, asked of nvidia-smi twice a second; None without nvidia-smi."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak: float | None = None
        self.stopped = threading.Event()

    def run(self) -> None:
        while shutil.which("nvidia-smi") and not self.stopped.wait(0.5):
            used = [float(mib) / 1024 for mib in _nvidia_smi("memory.used")]
            self.peak = max([self.peak or 0.0, *used])


def _nvidia_smi(field: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def read_step(line: str) -> dict[str, float] | None:
    """The figures of a line that the trainer logs at a step: loss and whatever else is in its dict."""
    found = re.search(r"\{[^{}]*'loss':[^{}]*\}", line)
    return {key: float(value) for key, value in ast.literal_eval(found[0]).items()} if found else None


def end(process: subprocess.Popen) -> None:
    """End a run with all its processes: torchrun's and the workers that decode."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(20)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def measure(
    options: argparse.Namespace,
    recipe_file: Path,
    overrides: list[str],
    name: str,
    gpus: int | None = None,
) -> dict[str, Any]:
    """Run a recipe and measure it.

    Args:
        options: of the command line (`add_options`), and `model`.
        recipe_file: the recipe.
        overrides: key=value, as for llamafactory-cli.
        name: of the run's log.
        gpus: how many are used; LLaMA-Factory's choice if not given.

    Returns:
        The figures; "status" is "ok", or says why there are none.
    """
    recipe = yaml.safe_load(recipe_file.read_text(encoding="utf-8"))
    for word in overrides:
        key, _, value = word.partition("=")
        recipe[key] = yaml.safe_load(value)
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    config = hashlib.sha256((options.config / "config.json").read_bytes()).hexdigest()[:8]
    model = options.work / f"model_{options.model}_{config}"
    make_model(options.config, model, options.model)

    environment = dict(os.environ)
    if gpus is None:
        import torch

        gpus = int(os.environ.get("NPROC_PER_NODE", torch.cuda.device_count() or 1))
    else:
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus))), "NPROC_PER_NODE": str(gpus)}
        if gpus > 1:
            environment["FORCE_TORCHRUN"] = "1"
    if recipe.get("deepspeed"):
        environment["FORCE_TORCHRUN"] = "1"
    clips_a_step = recipe["per_device_train_batch_size"] * recipe.get("gradient_accumulation_steps", 1) * gpus
    make_dataset(options.clips, options.work, clips_a_step * options.steps, options.mixed)
    run_dir = (options.work / "run").resolve()
    shutil.rmtree(run_dir, ignore_errors=True)
    recipe |= {
        "model_name_or_path": str(model.resolve()),
        "dataset": "clips",
        "dataset_dir": str(options.work.resolve()),
        "media_dir": str(options.clips.resolve()),
        "output_dir": str(run_dir),
        "max_steps": options.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "plot_loss": False,
    }
    file = options.work / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")

    steps: list[dict[str, float]] = []
    log_file = options.work / f"{name}.log"
    watch = MemoryWatch()
    watch.start()
    started = time.time()
    with log_file.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "llamafactory.cli", "train", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        timer = threading.Timer(options.limit, end, [process])
        timer.start()
        for line in process.stdout:
            log.write(line)
            if step := read_step(line):
                steps.append(step | {"second": round(time.time() - started, 2)})
                print(f"step {len(steps)}: {steps[-1]}", flush=True)
                if len(steps) == options.steps and not options.save:
                    end(process)
    code = process.wait()
    timer.cancel()
    watch.stopped.set()
    end(process)  # workers that a killed run left behind

    result = {
        "recipe": recipe_file.name,
        "model": options.model,
        "overrides": overrides,
        "gpu": _nvidia_smi("name")[0] if shutil.which("nvidia-smi") else "CPU",
        "gpus": gpus,
        "clips_a_step": clips_a_step,
        "seconds_in_all": round(time.time() - started, 1),
    }
    if len(steps) < options.steps or (options.save and code):
        text = log_file.read_text(encoding="utf-8")
        if "out of memory" in text.lower():
            status = "out of memory"
        elif result["seconds_in_all"] >= options.limit:
            status = f"not done in {options.limit} s"
        else:
            # The first error is the cause; those of the launcher follow.
            errors = re.findall(r"^(?:\[rank\d+\]: )?(\S*(?:Error|Exception)\b.*)$", text, re.MULTILINE)
            status = f"failed: {errors[0][:200] if errors else 'see its log'}"
        print(f"{text[-4000:]}\n{name}: {status}", flush=True)
        return result | {"status": status, "peak_gpu_gib": watch.peak and round(watch.peak, 1), "steps": steps}
    return result | {"status": "ok"} | summary(steps, clips_a_step, watch.peak) | {"steps": steps}


def summary(steps: list[dict[str, float]], clips_a_step: int, peak: float | None) -> dict[str, Any]:
    """The figures of a whole run; what the trainer logs of its speed and memory is taken as it is."""
    first = min(WARM_UP, len(steps) - 1)
    seconds = (steps[-1]["second"] - steps[first - 1]["second"]) / (len(steps) - first)
    logged = {}
    for key in steps[-1].keys() - {"loss", "grad_norm", "epoch", "second"}:
        if "learning_rate" not in key and not key.endswith("_lr"):
            values = [step[key] for step in steps[first:] if key in step]
            number = max(values) if "memory" in key else statistics.fmean(values)
            logged[key] = float(f"{number:.4g}")
    return {
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "seconds_a_step": round(seconds, 3),
        "clips_a_second": round(clips_a_step / seconds, 2) if seconds else math.nan,
        "peak_gpu_gib": peak and round(peak, 1),
        "logged": dict(sorted(logged.items())),
    }


def add_options(parser: argparse.ArgumentParser, steps: int, limit: int) -> None:
    parser.add_argument("--config", type=Path, required=True, help="folder with 4B's config.json and processor files")
    parser.add_argument("--clips", type=Path, required=True, help="folder of video files")
    parser.add_argument("--mixed", action="store_true", help="texts and pictures among the clips")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--work", type=Path, default=Path("bench_work"), help="folder for models, runs and logs")
    parser.add_argument("--limit", type=int, default=limit, help="the most seconds of a run")
    parser.add_argument("--save", action="store_true", help="let the run write the trained model")
    parser.add_argument("overrides", nargs="*", help="key=value, as for llamafactory-cli")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--model", choices=SIZES, default="4B", help="4B: as --config says")
    add_options(parser, steps=20, limit=3600)
    options = parser.parse_intermixed_args()
    result = measure(options, options.recipe, options.overrides, options.recipe.stem)
    (options.out / f"{options.recipe.stem}.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    if result["status"] != "ok":
        sys.exit(1)
    print(json.dumps({key: value for key, value in result.items() if key != "steps"}, indent=2))


if __name__ == "__main__":
    main()
