"""Answers about clips by `lmf-video infer` and by vLLM on the same GPU, in turn: are they the same, and how fast do they come?

    make demo
    python benchmarks/infer_against_vllm.py --model output/demo/tuned --data output/demo/test.json --out bench/ \\
        --vllm /path/to/vllm --serve '--dtype bfloat16 --max-model-len 4096'
    python benchmarks/infer_against_vllm.py --config Qwen3-VL-4B-Instruct/ --size 2B --clips clips/ --out bench/ ...

The first asks a trained model, and compares the answers; the second one of random weights in its real size, whose answers mean
nothing but take as long. vLLM is started as `lmf-video export --for vllm` says, in its own environment, and is sent clips
whole, and as frames that are sampled here. Ours runs before it and after it. Rates are those that `lmf-video infer` prints:
reading clips counts, loading the model does not. vLLM's caches of prompts and clips are off, since each clip is asked several
times here. Writes OUT/infer_against_vllm.json.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from infer_against_stock import COMMAND, infer, make_clips, run
from llamafactory_video.model.loading import contract_of, load_encoder
from llamafactory_video.model.servers import serving
from train_recipe import SIZES, make_model

OFFICIAL = {"video_sampling": "qwen_finetune", "video_fps": 4.0, "video_min_frames": 16, "video_max_frames": 32}
OFFICIAL |= {"video_min_pixels": 401408, "video_max_pixels": 1003520}
PROMPT = "描述这个视频并进行打标,使用json输出标签"


def make_data(options: argparse.Namespace) -> tuple[Path, Path]:
    """A model of random weights with a contract, and records."""
    work = options.work.resolve()
    model = work / options.size
    make_model(options.config, model, options.size)
    load_encoder(str(model), log=lambda _: None, **OFFICIAL).processor.save_pretrained(model)
    make_clips(options.clips, work / "clips", options.records)
    turn = {"from": "human", "value": f"<video>{PROMPT}"}
    records = [{"video": str(clip), "conversations": [turn]} for clip in sorted((work / "clips").iterdir())]
    (work / "records.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return model, work / "records.json"


def ask(name: str, model: str, data: Path, options: argparse.Namespace, *words: str) -> dict[str, Any]:
    """Rate and answers of one call of `lmf-video infer`."""
    words = ("--max-new-tokens", str(options.new_tokens), *words)
    result = infer(name, model, data, options.work, *words)
    print(f"{name}: {result['clips_a_second']} clips/s", flush=True)
    return result


@contextmanager
def server(model: Path, options: argparse.Namespace) -> Iterator[str]:
    """vLLM at an address, as its command is written beside a model."""
    run([sys.executable, "-c", COMMAND, "export", "--for", "vllm", str(model)])
    words = serving("vllm", model, contract_of(str(model))[1]).command[1:]
    no_caches = ("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0")
    command = [*shlex.split(options.vllm), *words, "--port", "8123", *no_caches, *shlex.split(options.serve)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    log = options.out / "vllm.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
    try:
        began = time.monotonic()
        while True:
            if process.poll() is not None or time.monotonic() - began > options.patience:
                sys.exit(f"vLLM did not start:\n{log.read_text(encoding='utf-8')[-6000:]}")
            try:
                if requests.get("http://127.0.0.1:8123/health", timeout=5).ok:
                    break
            except requests.RequestException:
                time.sleep(1)
        yield "http://127.0.0.1:8123/v1"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a trained model")
    parser.add_argument("--data", type=Path, help="records that it is asked")
    parser.add_argument(
        "--config", type=Path, help="in place of both: folder with a model's config and processor files"
    )
    parser.add_argument("--size", default="2B", choices=SIZES)
    parser.add_argument("--clips", type=Path, help="folder of clips")
    parser.add_argument("--records", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("bench_work"), help="for models, clips and caches")
    parser.add_argument("--vllm", default="vllm", help="the command of vLLM, in its own environment")
    parser.add_argument("--serve", default="", help="more words for `vllm serve`")
    parser.add_argument("--patience", type=float, default=300, help="seconds until it must have started")
    parser.add_argument("--dtype", default="bfloat16", help="of ours")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--at-once", type=int, nargs="+", default=[4, 16, 64], help="questions that vLLM is asked")
    options = parser.parse_args()
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    model, data = make_data(options) if options.config else (options.model, options.data)
    words = ("--dtype", options.dtype)
    results = [ask("ours", str(model), data, options, *words)]
    frames = ("--send", "frames", "--sampled-as", str(model))
    with server(model, options) as address:
        ask("vLLM's first", address, data, options, "--batch-size", "16")  # it compiles what it meets first
        for at_once in options.at_once:
            for name, sent in (("whole", ()), ("frames", frames)):
                words_of = (*sent, "--batch-size", str(at_once))
                results.append(ask(f"vLLM, {name}, {at_once} at once", address, data, options, *words_of))
    results.append(ask("ours", str(model), data, options, *words))
    print("| run | clips/s | x ours | answers as ours |\n|---|---|---|---|")
    ours = results[0]
    for result in results:
        same = sum(a == b for a, b in zip(result["answers"], ours["answers"], strict=True))
        ratio = result["clips_a_second"] / ours["clips_a_second"]
        print(f"| {result['run']} | {result['clips_a_second']:.2f} | {ratio:.2f} | {same} of {len(ours['answers'])} |")
    text = json.dumps(results, ensure_ascii=False, indent=2)
    (options.out / "infer_against_vllm.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
