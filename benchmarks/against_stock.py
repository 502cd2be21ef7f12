"""Training by stock LLaMA-Factory and by this project, in turn, on one machine, on the same clips, model and order.

    python benchmarks/against_stock.py --config Qwen3-VL-4B-Instruct/ --clips clips/ --out bench/

Each run is `llamafactory-cli train` in a process of its own: 16 clips a step, sampled as LLaMA-Factory samples them so
that both see the same tokens, all modules at one learning rate, since stock knows no other, and its mean of the
micro-batches' means for the loss. Milliseconds a clip are the mean of the steps from `--warm-up` on. `busy` is nvidia-smi's share of
time in which the GPU did something; memory is the most that it showed; `recompiled` counts what torch.compile did again after
the warm-up. Prints a line a run as it is done and a table, and writes OUT/against_stock.json.
"""

import argparse
import json
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
from typing import Any, NamedTuple

import av
import numpy as np
import yaml
from train_recipe import SIZES, make_dataset, make_model, read_step

RECIPES = Path(__file__).parents[1] / "recipes"
OURS = (  # keys of a recipe that stock does not know
    *("video_sampling", "video_min_frames", "video_max_frames", "video_cache", "video_fit", "data_flatten"),
    *("vision_tower_lr", "mm_projector_lr"),
)
STEP = 16  # clips


class Run(NamedTuple):
    """One run of a case; `keys` override the recipe."""

    name: str
    size: str
    recipe: str
    batch: int
    stock: bool
    keys: dict[str, Any] = {}  # noqa: RUF012 - never changed
    data: str = "given"


def turns(case: str, size: str, recipe: str, batches: dict[str, int], data: str = "given") -> list[Run]:
    """The runs of a case, stock's and ours in turn."""
    flat = Run(
        f"{case}: ours, {batches['ours']} x {STEP // batches['ours']}", size, recipe, batches["ours"], False, {}, data
    )
    runs = [
        Run(f"{case}: stock, {n} x {STEP // n}", size, recipe, n, True, {}, data)
        for name, n in batches.items()
        if name.startswith("stock")
    ]
    everything = {"gradient_checkpointing_policy": "all"}
    return [
        runs[0],
        flat._replace(keys={"compile_layers": True}),
        flat._replace(name=f"{flat.name}, not compiled", keys={"compile_layers": False}),
        *runs[1:],
        flat._replace(name=f"{flat.name}, all recomputed", keys={"compile_layers": True, **everything}),
    ]


CASES = {
    "2B full": ("2B", "wzry_full_1gpu", {"stock": 8, "stock small": 2, "ours": 8}),
    "4B LoRA": ("4B", "wzry_lora", {"stock": 2, "stock large": 8, "ours": 8}),
    "2B mixed lengths": ("2B", "wzry_full_1gpu", {"stock": 4, "ours": 4}, "mixed"),
    "4B frozen vision": ("4B", "wzry_frozen_vision", {"stock": 8, "stock small": 2, "ours": 8}),
    "4B bf16": ("4B", "wzry_full_bf16", {"stock": 8, "ours": 8}),
}


class Watch(threading.Thread):
    """Memory in GiB, at most, and busy share of the GPU, by nvidia-smi five times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.memory, self.samples, self.stopped = 0.0, [], threading.Event()

    def run(self) -> None:
        query = "--query-gpu=memory.used,utilization.gpu"
        while shutil.which("nvidia-smi") and not self.stopped.wait(0.2):
            command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
            line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
            memory, busy = (float(part) for part in line.split(","))
            self.memory = max(self.memory, memory / 1024)
            self.samples.append((time.monotonic(), busy))


def recipe_of(run: Run, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The recipe of a run."""
    recipe = yaml.safe_load((RECIPES / f"{run.recipe}.yaml").read_text(encoding="utf-8"))
    recipe = {key: value for key, value in recipe.items() if key not in OURS}
    recipe |= {
        "model_name_or_path": str(work / run.size),
        "dataset_dir": str(work / run.data),
        "media_dir": str(work),
        "dataset": "stock" if run.stock else "clips",
        "template": "qwen3_vl_nothink" if run.stock else "qwen3_vl_video",
        "output_dir": str(work / re.sub(r"\W+", "_", run.name)),
        "video_fps": 4.0,
        "video_maxlen": 32 if run.data == "given" else 120,
        "video_max_pixels": 1003520 // 32 if run.data == "given" else 102400,
        "video_min_pixels": 256,
        "per_device_train_batch_size": run.batch,
        "gradient_accumulation_steps": STEP // run.batch,
        "dataloader_num_workers": options.workers,
        "max_steps": options.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "plot_loss": False,
        "seed": 7,
        "deepspeed": None,
        "bf16": not options.cpu,
        "use_cpu": options.cpu,
    }
    if options.cpu:
        recipe |= {"tf32": None, "quantization_bit": None}
    if not run.stock:
        cache = {
            "video_cache_dir": str(work / "cache"),
            "loss_normalization": "micro_batches",
            "video_timestamps": "index",
        }
        recipe |= {"video_sampling": "llamafactory", **cache, **run.keys}
    return {key: value for key, value in recipe.items() if value is not None}


def train(run: Run, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train, and what was measured; the process is ended after its last step."""
    file, recipe = work / "recipe.yaml", recipe_of(run, work, options)
    shutil.rmtree(recipe["output_dir"], ignore_errors=True)  # of an earlier run of this script
    file.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    environment = {
        **os.environ,
        "LLAMAFACTORY_VIDEO_DISABLE": "1" if run.stock else "0",
        "PYTHONUNBUFFERED": "1",
        "TORCH_LOGS": "recompiles",
    }
    watch, steps, times, tail, recompiled, compiling = Watch(), [], [], [], 0, []
    watch.start()
    process = subprocess.Popen(
        [sys.executable, "-m", "llamafactory.cli", "train", str(file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    for line in process.stdout:
        tail = [*tail[-60:], line]
        recompiled += "Recompiling function" in line and len(steps) >= options.warm_up
        compiling += re.findall(r"torch\.compile .*", line)
        step = read_step(line)
        if step is not None:
            steps.append(step)
            times.append(time.monotonic())
            if len(steps) == options.steps:
                os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    watch.stopped.set()
    if len(steps) < options.steps:
        reason = next((line.strip() for line in reversed(tail) if "Error" in line), "".join(tail[-5:]))
        return {"run": run.name, "failed": reason}
    first = options.warm_up - 1
    milliseconds = 1000 * (times[-1] - times[first]) / (len(times) - 1 - first) / STEP
    busy = [value for at, value in watch.samples if times[first] < at < times[-1]]
    mfu = [step["mfu"] for step in steps[first:] if "mfu" in step]
    return {
        "run": run.name,
        "ms_a_clip": round(milliseconds, 1),
        "tokens_a_second": round(statistics.median([s.get("tokens_per_second", 0) for s in steps[first:]])) or None,
        "mfu": round(statistics.median(mfu), 4) if mfu else None,
        "busy": round(statistics.mean(busy) / 100, 2) if busy else None,
        "memory_gib": round(watch.memory, 1),
        "recompiled": recompiled,
        "compiling": compiling,
        "losses": [step["loss"] for step in steps],
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown, with each run's speed over that of each stock run of its case."""
    lines = [
        "| run | ms a clip | x stock | MFU | GPU busy | memory GiB | last loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        case = result["run"].partition(":")[0]
        stock = [r for r in results if r["run"].startswith(f"{case}: stock") and "ms_a_clip" in r]
        if "failed" in result:
            lines.append(f"| {result['run']} | {result['failed'][:80]} | | | | | |")
            continue
        ratios = " and ".join(f"{r['ms_a_clip'] / result['ms_a_clip']:.2f}" for r in stock)
        cells = [result["run"], result["ms_a_clip"], ratios, result["mfu"], result["busy"], result["memory_gib"]]
        lines.append(
            "| " + " | ".join("" if cell is None else str(cell) for cell in [*cells, result["losses"][-1]]) + " |"
        )
    return "\n".join(lines)


def make_mixed(folder: Path, count: int = 24) -> None:
    """Clips of 0.5 to 30 s, 640 x 360 at 10 frames/s, whose lengths are spread evenly on a logarithmic scale."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (45, 80, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    order = np.random.default_rng(1).permutation(count)
    for number, seconds in zip(order, np.geomspace(0.5, 30, count), strict=True):
        with av.open(str(unfinished / f"{number:02}.mp4"), "w") as file:
            stream = file.add_stream("libx264", 10, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
            for at in range(round(10 * seconds)):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(noise, 5 * at, axis=1))))
            file.mux(stream.encode())
    unfinished.rename(folder)


def make_given(clips: Path, folder: Path) -> None:
    """The given clips; one whose header names another number of frames than it holds is encoded anew.

    Of such a clip stock takes other frames, or all, and tells the model other times: two runs would not see the same.
    """
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for clip in sorted(path.resolve() for path in clips.iterdir() if path.is_file()):
        with av.open(str(clip)) as file:
            stream = file.streams.video[0]
            frames = list(file.decode(stream))
            if len(frames) == stream.frames:
                (unfinished / clip.name).symlink_to(clip)
                continue
            print(f"{clip.name}: its header names {stream.frames} frames, it holds {len(frames)}; encoded anew")
            rate = stream.average_rate
        with av.open(str(unfinished / f"{clip.name}.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
            for number, frame in enumerate(frames):
                frame.pts, frame.time_base = number, 1 / rate
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
    unfinished.rename(folder)


def make_data(clips: Path, folder: Path, records: int) -> None:
    """The records as ours and as stock read them: texts alone, and lists of clips."""
    folder.mkdir(exist_ok=True)
    make_dataset(clips, folder, records)
    rows = json.loads((folder / "clips.json").read_text(encoding="utf-8"))
    for row in rows:
        row["videos"] = [row.pop("video")]
        row["conversations"][1]["value"] = json.dumps(row["conversations"][1]["value"], ensure_ascii=False)
    (folder / "stock.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    columns = {"messages": "conversations", "videos": "videos"}
    info["stock"] = {"file_name": "stock.json", "formatting": "sharegpt", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options that this script and those beside it have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, required=True, help="folder with the model's config and processor files"
    )
    parser.add_argument("--clips", type=Path, required=True, help="folder of clips")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("bench_work"), help="for models and caches")
    parser.add_argument("--workers", type=int, default=8, help="processes that read clips, of the data loader")
    parser.add_argument("--cpu", action="store_true", help="try the script without a GPU, with a small config")
    return parser


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--only", default="", help="pattern of the names of the runs that are wanted")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warm-up", type=int, default=5, help="steps that are not measured")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    make_given(options.clips, work / "given_clips")
    make_mixed(work / "mixed_clips")
    for name in ("given", "mixed"):
        make_data(work / f"{name}_clips", work / name, STEP * options.steps)
    results = []
    for case in options.cases:
        size = CASES[case][0]
        make_model(options.config, work / size, size if size in SIZES else "4B")
        for run in turns(case, *CASES[case]):
            if re.search(options.only, run.name):
                results.append(train(run, work, options))
                print(json.dumps(results[-1], ensure_ascii=False), flush=True)
    print(table(results))
    (options.out / "against_stock.json").write_text(
        json.dumps(results, indent=2, ensure_ascii=False), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
