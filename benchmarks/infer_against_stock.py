"""Answers about clips by stock LLaMA-Factory's do_predict and by `lmf-video infer`, in turn, on one machine.

    python benchmarks/infer_against_stock.py --config Qwen3-VL-4B-Instruct/ --clips clips/ --out bench/

Both have the same random weights, clips, sampling and number of new tokens, and neither has seen the clips before. These are
cut from the given ones, each from another place and a little brighter or darker, so that no two are the same. The rate is
that which each prints of itself: stock's includes its BLEU and ROUGE, ours the reading of records; loading the model counts
in neither. Answers are not compared: stock gives `generate` no types of tokens, so that it counts the positions of visual
tokens as if they were text, and other answers come out. Writes OUT/infer_against_stock.json.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
from against_stock import make_data, make_parser
from train_recipe import SIZES, make_model

PROMPT_SAMPLING = {"video_fps": 4.0, "video_max_pixels": 31360, "video_min_pixels": 256}
FRAMES = 32
COMMAND = "from llamafactory_video.tools.cli import main; raise SystemExit(main())"
# Stock hands `generate` the clips' metadata, which transformers refuses, so that its do_predict fails on clips as it is.
STOCK = """
from llamafactory.cli import main
from transformers import GenerationMixin
generate = GenerationMixin.generate
GenerationMixin.generate = lambda self, *args, video_metadata=None, **others: generate(self, *args, **others)
main()
"""


def cut(source: Path, target: Path, number: int) -> None:
    """A clip of up to 10 s from another place of its source, a little brighter or darker."""
    with av.open(str(source)) as file:
        stream = file.streams.video[0]
        rate = round(float(stream.average_rate or 25))
        frames = [
            frame.to_ndarray(format="rgb24") for _, frame in zip(range(30 * rate), file.decode(stream), strict=False)
        ]
    frames = frames[(number * 7) % max(1, len(frames) // 2) :][: 10 * rate]
    with av.open(str(target), "w") as file:
        stream = file.add_stream("libx264", rate, options={"preset": "ultrafast", "threads": "1"})
        height, width = (side // 2 * 2 for side in frames[0].shape[:2])
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames:
            shown = np.clip(frame[:height, :width].astype(np.int16) + number % 41 - 20, 0, 255).astype(np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        file.mux(stream.encode())


def make_clips(given: Path, folder: Path, count: int) -> None:
    """`count` clips, no two the same; made once."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    sources = sorted(path for path in given.iterdir() if path.is_file())
    with ProcessPoolExecutor() as pool:
        targets = [unfinished / f"{number:03}.mp4" for number in range(count)]
        list(pool.map(cut, [sources[i % len(sources)] for i in range(count)], targets, range(count)))
    unfinished.rename(folder)


def run(command: list[str], **environment: str) -> str:
    """What a command prints.

    Raises:
        SystemExit: if it fails, with the end of that.
    """
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, errors="replace", check=False
    )
    text = done.stdout + done.stderr
    if done.returncode:
        sys.exit(text[-3000:])
    return text


def stock(work: Path, options: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Stock's do_predict."""
    output = work / f"stock_{batch}"
    shutil.rmtree(output, ignore_errors=True)
    keys = {
        "model_name_or_path": str(work / options.size),
        "stage": "sft",
        "finetuning_type": "full",
        "do_predict": True,
        "predict_with_generate": True,
        "do_sample": False,
        "max_new_tokens": options.new_tokens,
        "template": "qwen3_vl_nothink",
        "eval_dataset": "stock",
        "dataset_dir": str(work / "data"),
        "cutoff_len": 8192,
        **PROMPT_SAMPLING,
        "video_maxlen": FRAMES,
        "per_device_eval_batch_size": batch,
        "dataloader_num_workers": options.workers,
        "bf16": not options.cpu,
        "use_cpu": options.cpu,
        "report_to": "none",
        "output_dir": str(output),
    }
    (work / "stock.yaml").write_text(json.dumps(keys), encoding="utf-8")
    run([sys.executable, "-c", STOCK, "train", str(work / "stock.yaml")], LLAMAFACTORY_VIDEO_DISABLE="1")
    rate = json.loads((output / "predict_results.json").read_text())["predict_samples_per_second"]
    lines = (output / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "run": f"stock, {batch} at once",
        "clips_a_second": rate,
        "answers": [json.loads(x)["predict"] for x in lines],
    }


def infer(name: str, model: str, data: Path, work: Path, *words: str) -> dict[str, Any]:
    """What one call of `lmf-video infer` prints of its rate, and its answers; nothing of an earlier call is kept."""
    out, cache = work / "answers.jsonl", work / "cache"
    out.unlink(missing_ok=True)
    shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, "-c", COMMAND, "infer", "--model", model, "--data", str(data), "--out", str(out)]
    text = run([*command, *words], XDG_CACHE_HOME=str(cache))
    rate = float(re.search(r"questions in .* s, ([\d.]+) a second", text)[1])
    lines = out.read_text(encoding="utf-8").splitlines()
    return {"run": name, "clips_a_second": rate, "answers": [json.loads(line)["answer"] for line in lines]}


def ours(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`lmf-video infer`."""
    sampling = {
        "video_sampling": "llamafactory",
        **PROMPT_SAMPLING,
        "video_max_frames": FRAMES,
        "video_timestamps": "index",
    }
    words = [
        word
        for key, value in sampling.items()
        for word in (f"--{key.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value))
    ]
    words = ["--max-new-tokens", str(options.new_tokens), *words]
    return infer("ours", str(work / options.size), work / "data/clips.json", work, *words)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--size", default="2B", help=f"one of {', '.join(SIZES)}, or as the config is")
    parser.add_argument("--records", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="of stock")
    options = parser.parse_args()
    work = options.work.resolve()
    for folder in (options.out, work):
        folder.mkdir(parents=True, exist_ok=True)
    make_clips(options.clips, work / "clips", options.records)
    make_data(work / "clips", work / "data", options.records)
    make_model(options.config, work / options.size, options.size if options.size in SIZES else "4B")
    results = []
    for batch in options.batches:
        for result in (stock(work, options, batch), ours(work, options)):
            results.append(result)
            print(json.dumps({key: value for key, value in result.items() if key != "answers"}), flush=True)
    print("| run | clips/s | x the stock run before it |\n|---|---|---|")
    for before, result in zip([None, *results], results, strict=False):
        cells = [result["run"], f"{result['clips_a_second']:.2f}", ""]
        if result["run"] == "ours":
            cells[2] = f"{result['clips_a_second'] / before['clips_a_second']:.2f}"
        print(f"| {' | '.join(cells)} |")
    file = options.out / "infer_against_stock.json"
    file.write_text(json.dumps(results, ensure_ascii=False, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
