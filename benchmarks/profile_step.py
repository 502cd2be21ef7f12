"""Steps of a case of against_stock.py under torch's profiler: what the GPU does, and how often the host waits for it.

    python benchmarks/profile_step.py --config Qwen3-VL-4B-Instruct/ --clips clips/ --out bench/ --case "2B full"

Trains in this process and profiles `--profiled` steps of which no line of the log is written. Prints waits of the host for
the device a step, the share of time in which a kernel ran, and the kernels and copies that took longest; writes
OUT/profile.json.
"""

import argparse
import json
import os
import shutil
import sys
import time
from typing import Any

import torch
import yaml
from against_stock import CASES, STEP, make_data, make_given, make_mixed, make_parser, recipe_of, turns
from torch.autograd import DeviceType
from train_recipe import make_model
from transformers import TrainerCallback

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


class Profile(TrainerCallback):
    """Profiles steps of a run, then ends the process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began = options, 0.0
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self.profiler = torch.profiler.profile(activities=activities[: 1 if options.cpu else 2])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.options.steps - self.options.profiled:
            self._wait()
            self.profiler.start()
            self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < self.options.steps:
            return
        ran_ahead = time.perf_counter() - self.began
        self._wait()
        seconds = time.perf_counter() - self.began
        self.profiler.stop()
        self._tell(seconds, ran_ahead)
        sys.stdout.flush()
        os._exit(0)

    def _wait(self) -> None:
        if not self.options.cpu:
            torch.cuda.synchronize()

    def _tell(self, seconds: float, ran_ahead: float) -> None:
        steps, events = self.options.profiled, self.profiler.events()
        waits = {name: sum(event.name == name for event in events) / steps for name in WAITS}
        kernels: dict[str, list[float]] = {}
        for event in events:
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
                kernels.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1000)
        longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))
        result = {
            "case": self.options.case,
            "ms_a_step": round(1000 * seconds / steps, 1),
            "ms_a_clip": round(1000 * seconds / steps / STEP, 2),
            "host_done_after_ms_a_step": round(1000 * ran_ahead / steps, 1),
            "waits_a_step": waits,  # the one at the end, for the clock, is not the step's own
            "kernel_time_share": round(sum(map(sum, kernels.values())) / 1000 / seconds, 3),
            "kernels_a_step": round(sum(map(len, kernels.values())) / steps),
            "longest": [
                {"name": name[:110], "ms_a_step": round(sum(times) / steps, 2), "calls_a_step": len(times) / steps}
                for name, times in longest[:30]
            ],
        }
        (self.options.out / "profile.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
        print(json.dumps({key: value for key, value in result.items() if key != "longest"}))
        for row in result["longest"]:
            print(f"{row['ms_a_step']:9.2f} ms {row['calls_a_step']:8.1f} x  {row['name']}")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--case", default="2B full", choices=list(CASES))
    parser.add_argument("--profiled", type=int, default=3, help="steps, at the end")
    parser.add_argument("--steps", type=int, default=11, help="in all")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="of the recipe")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    make_given(options.clips, work / "given_clips")
    make_mixed(work / "mixed_clips")
    for name in ("given", "mixed"):
        make_data(work / f"{name}_clips", work / name, STEP * options.steps)
    make_model(options.config, work / CASES[options.case][0], CASES[options.case][0])
    ours = turns(options.case, *CASES[options.case])[1]
    recipe = recipe_of(ours, work, options) | {"logging_steps": 10000, "gradient_check": "off"}
    recipe |= {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in options.keys)}
    shutil.rmtree(recipe["output_dir"], ignore_errors=True)

    from llamafactory.train.tuner import run_exp  # after the model was made in a process of its own

    run_exp(recipe, callbacks=[Profile(options)])


if __name__ == "__main__":
    main()
