"""Every way of training and every model size, one after the other on one GPU, as one table.

    CUDA_VISIBLE_DEVICES=0 python benchmarks/variants.py --config Qwen3-VL-4B-Instruct/ --clips clips/ --out bench/

Each runs for a few steps at its recipe's batch of a GPU, with the models and records of `train_recipe.py`; words after
the options override every recipe. `--only 2B 4B/wzry_lora` runs those alone. One that does not fit into memory, or is
not done in --limit seconds, gets a row that says so. Every result is in OUT/variants.json as soon as it is there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from train_recipe import add_options, measure

RECIPES = Path(__file__).parents[1] / "recipes"
# Size, recipe, micro-batches a step: from two on, memory is that of any number.
VARIANTS = [
    ("4B", "wzry_full_1gpu", 2),
    ("4B", "wzry_full_bf16", 2),
    ("4B", "wzry_frozen_vision", 2),
    ("4B", "wzry_projector_only", 2),
    ("4B", "wzry_lora", 2),
    ("4B", "wzry_lora_vision", 2),
    ("4B", "wzry_qlora", 2),
    ("4B", "wzry_dora", 2),
    ("2B", "wzry_full_1gpu", 2),
    ("2B", "wzry_lora", 2),
    ("8B", "wzry_full_bf16", 2),
    ("8B", "wzry_lora", 2),
]


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| recipe | model | peak GiB | clips/s | tokens/s | MFU | first loss | last loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        logged = result.get("logged", {})
        if result["status"] == "ok":
            figures = [result["clips_a_second"], logged.get("tokens_per_second"), logged.get("mfu")]
            figures += [result["first_loss"], result["last_loss"]]
        else:
            figures = [result["status"], "", "", "", ""]
        cells = [result["recipe"], result["model"], result["peak_gpu_gib"], *figures]
        lines.append(f"| {' | '.join('n/a' if cell is None else str(cell) for cell in cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="sizes, recipes or size/recipe")
    add_options(parser, steps=7, limit=120)
    options = parser.parse_intermixed_args()
    known = {word for size, recipe, _ in VARIANTS for word in (size, recipe, f"{size}/{recipe}")}
    if unknown := set(options.only) - known:
        parser.error(f"--only {', '.join(sorted(unknown))}: known are {', '.join(sorted(known))}")
    results: list[dict[str, Any]] = []
    for size, recipe, micro_batches in VARIANTS:
        name = f"{size}/{recipe}"
        if options.only and not {size, recipe, name} & set(options.only):
            continue
        print(f"--- {name}", flush=True)
        options.model = size
        overrides = [f"gradient_accumulation_steps={micro_batches}", *options.overrides]
        results.append(measure(options, RECIPES / f"{recipe}.yaml", overrides, name.replace("/", "_"), gpus=1))
        (options.out / "variants.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
