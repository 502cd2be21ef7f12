"""The same training on one GPU and, by each engine, on several: do the losses agree, and how fast is it?

    python benchmarks/distributed.py recipes/wzry_full_1gpu.yaml --config Qwen3-VL-4B-Instruct/ --clips clips/ \\
        --out bench/

All runs have the same weights, records, seed, batch of a GPU and clips a step; one GPU takes the micro-batches of the
others in turn. Scaling is therefore clips a second over those of one GPU. `--offload` adds the variants that keep the
optimizer, or weights too, in the machine's memory; `--only ZeRO-3 FSDP2` runs those (beside one GPU) alone.
Words after the options override the recipe. Models and records are those of `train_recipe.py`. Every result is in
OUT/distributed.json as soon as it is there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from train_recipe import SIZES, add_options, measure

RECIPES = Path(__file__).parents[1] / "recipes"
FSDP2_CONFIG = f"fsdp_config={RECIPES / 'fsdp2.json'}"
ENGINES = {
    "DDP": [],
    "ZeRO-2": [f"deepspeed={RECIPES / 'deepspeed_zero2.json'}"],
    "ZeRO-3": [f"deepspeed={RECIPES / 'deepspeed_zero3.json'}"],
    "FSDP2": ["fsdp=auto_wrap", FSDP2_CONFIG],
}
OFFLOAD = {
    "ZeRO-2 offload": [f"deepspeed={RECIPES / 'deepspeed_zero2_offload.json'}"],
    "ZeRO-3 offload": [f"deepspeed={RECIPES / 'deepspeed_zero3_offload.json'}"],
    "FSDP2 offload": ["fsdp=[auto_wrap,offload]", FSDP2_CONFIG],
}


def difference(result: dict[str, Any], one: dict[str, Any]) -> float:
    """The largest relative difference of a step's loss from that on one GPU."""
    return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(result["steps"], one["steps"], strict=True))


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown: a table of figures, and one of the losses by step."""
    one = results["one GPU"]
    lines = ["| engine | GPUs | peak GiB | clips/s | scaling | loss differs at most by |", "|---|---|---|---|---|---|"]
    for name, result in results.items():
        cells = [name, result["gpus"], "n/a" if result["peak_gpu_gib"] is None else result["peak_gpu_gib"]]
        if result["status"] != "ok":
            cells += [result["status"], "", ""]
        elif one["status"] != "ok":
            cells += [result["clips_a_second"], "", ""]
        else:
            cells += [result["clips_a_second"], f"{result['clips_a_second'] / one['clips_a_second']:.2f}"]
            cells += [f"{difference(result, one):.2%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    done = {name: result for name, result in results.items() if result["status"] == "ok"}
    lines += ["", f"| step | {' | '.join(done)} |", "|---" * (len(done) + 1) + "|"]
    losses = zip(*([step["loss"] for step in result["steps"]] for result in done.values()), strict=True)
    lines += [f"| {i} | {' | '.join(map(str, row))} |" for i, row in enumerate(losses, 1)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--model", choices=SIZES, default="4B", help="4B: as --config says")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="clips of a GPU at once")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a GPU in a step, with --gpus GPUs")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--only", nargs="+", choices=[*ENGINES, *OFFLOAD], default=[], metavar="ENGINE")
    add_options(parser, steps=8, limit=300)
    options = parser.parse_intermixed_args()
    engines = ENGINES | (OFFLOAD if options.offload else {})
    if options.only:
        engines = {name: (ENGINES | OFFLOAD)[name] for name in options.only}

    results: dict[str, dict[str, Any]] = {}
    for name, words in {"one GPU": [], **engines}.items():
        print(f"--- {name}", flush=True)
        gpus = 1 if name == "one GPU" else options.gpus
        batch = [
            f"per_device_train_batch_size={options.batch}",
            f"gradient_accumulation_steps={options.micro_batches * options.gpus // gpus}",
        ]
        overrides = ["deepspeed=null", *batch, *words, *options.overrides]
        run = name.replace(" ", "_")
        results[name] = measure(options, options.recipe, overrides, run, gpus)
        (options.out / "distributed.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
