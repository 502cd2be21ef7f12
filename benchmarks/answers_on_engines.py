"""Do answers while training (`eval_generate`) come out the same by each engine as on one GPU, where weights are spread too?

    make demo
    python benchmarks/answers_on_engines.py --model output/demo/tuned --data output/demo --gpus 2 --out bench/

Each run evaluates the same weights (the learning rate is 0) on the demo's 96 held-out clips; measures and seconds are printed
beside those of one GPU. On a machine without GPUs two processes of DDP are compared, and DeepSpeed's ZeRO-2.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from distributed import ENGINES

CPU_ENGINES = ("DDP", "ZeRO-2")


def measures(options: argparse.Namespace, name: str, words: list[str], processes: int) -> dict[str, Any]:
    """What one run's log says of the answers, and the seconds of its evaluation."""
    has_gpu = torch.cuda.is_available()
    recipe = {
        **{"model_name_or_path": str(options.model), "template": "qwen3_vl_video", "stage": "sft", "do_train": True},
        **{"finetuning_type": "full", "freeze_vision_tower": False, "freeze_multi_modal_projector": False},
        **{
            "dataset": "demo_test",
            "eval_dataset": "demo_test",
            "dataset_dir": str(options.data),
            "media_dir": str(options.data),
        },
        **{
            "video_cache": False,
            "output_dir": str(options.out / name),
            "overwrite_output_dir": True,
            "report_to": "none",
        },
        **{"per_device_train_batch_size": 2, "per_device_eval_batch_size": 8, "max_steps": 1, "learning_rate": 0.0},
        **{
            "eval_strategy": "steps",
            "eval_steps": 1,
            "eval_generate": 96,
            "max_new_tokens": 64,
            "save_strategy": "no",
        },
        **{"bf16": has_gpu, "use_cpu": not has_gpu, "compile_layers": False, "cutoff_len": 512},
    }
    file = options.out / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    env = {**os.environ, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(processes)} if processes > 1 else {**os.environ}
    if has_gpu:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(processes)))
    command = [sys.executable, "-m", "llamafactory.cli", "train", str(file), *words]
    began = time.monotonic()
    with (options.out / f"{name}.log").open("w") as log:
        done = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=options.limit)
    if done.returncode:
        tail = (options.out / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-1500:]
        return {"failed": tail}
    history = json.loads((options.out / name / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    line = next(line for line in history if "eval_score" in line)
    kept = {key: value for key, value in line.items() if key.startswith("eval_")}
    return {**kept, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=200, help="seconds of a run")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    engines = {n: w for n, w in ENGINES.items() if torch.cuda.is_available() or n in CPU_ENGINES}
    for name, words in {"one": [], **engines}.items():
        print(name, json.dumps(measures(options, name, words, 1 if name == "one" else options.gpus)), flush=True)


if __name__ == "__main__":
    main()
