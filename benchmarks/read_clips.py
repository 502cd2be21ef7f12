"""Reading clips, measured beside stock LLaMA-Factory in turn, in one run on one machine.

    python benchmarks/read_clips.py --config Qwen3-VL-4B-Instruct/ --clips clips/ --out bench/

`--config` is a folder with the model's processor files. Without `--clips` it draws its own: 15 s of 720p30 H.264 by
x264's defaults, and recordings of minutes with key frames near and far. Prints, and writes to OUT/read_clips.json:

- first read: probe, decode, resize and patches of a clip, in CPU and wall seconds, against LLaMA-Factory's own plugin
  on the same clip with the same number of frames and nearly the same size; and the share of the file's packets that
  had to be decoded;
- cached read: from the frame cache to patches, in CPU time and memory over many reads;
- records a second and core, from a record to its prompt's ids, without decoding.
"""

import argparse
import copy
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from llamafactory.data.mm_plugin import get_mm_plugin
from llamafactory_video.model.processor import apply_to_processor
from llamafactory_video.prompt.encoder import Encoder
from llamafactory_video.prompt.pixels import frames_to_patches
from llamafactory_video.records.parse import parse_record
from llamafactory_video.video import decode
from llamafactory_video.video.cache import FrameCache
from llamafactory_video.video.probe import ClipError, probe
from llamafactory_video.video.reader import ClipReader
from tqdm import tqdm
from transformers import AutoProcessor

# The official recipe: at most 32 frames and 490 tokens a clip.
KEYS = {
    "video_fps": 4.0,
    "video_min_frames": 16,
    "video_maxlen": 32,
    "video_min_pixels": 401408,
    "video_max_pixels": 1003520,
}


def draw_clip(path: Path, seconds: float, height: int, width: int, rate: int = 30, gop: int = 250) -> None:
    """A clip with moving texture, cuts and grain, so that it codes like a recording and not like a test chart."""
    random = np.random.default_rng(0)
    canvas = random.integers(0, 256, (height // 8 + 64, width // 8 + 64, 3)).astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"g": str(gop)})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for i in range(round(seconds * rate)):
            if i % (4 * rate) == 0:
                scene = torch.from_numpy(np.roll(canvas, random.integers(0, 64, 2), (0, 1))).permute(2, 0, 1)[None]
                scene = torch.nn.functional.interpolate(scene, scale_factor=8, mode="bicubic")[0].permute(1, 2, 0)
                scene = scene.clamp(0, 255).numpy()
            x, y = int(96 + 80 * np.sin(i / 37)), int(96 + 60 * np.cos(i / 23))
            picture = scene[y : y + height, x : x + width] + random.normal(0, 2, (height, width, 1))
            picture[height // 3 : height // 2, (i * 5) % (width - 80) :][:, :80] = (220, 40, 40)
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """CPU seconds (all threads), wall seconds and the result."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def memory_mib() -> float:
    """What this process holds now, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def first_reads(clips: list[Path], processor: Any, sampling: Any, threads: int, rounds: int) -> list[dict[str, Any]]:
    stock = get_mm_plugin("qwen3_vl", image_token="<|image_pad|>", video_token="<|video_pad|>")
    stock_processor = copy.copy(processor)
    settings = {
        "video_fps": sampling.fps,
        "video_maxlen": sampling.max_frames,
        "video_max_pixels": sampling.max_pixels // sampling.max_frames,
        "video_min_pixels": 256,
        "image_max_pixels": 589824,
        "image_min_pixels": 1024,
    }
    for name, value in settings.items():
        setattr(stock_processor, name, value)
    named = decode._named
    calls = 0

    def counting(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return named(*args)

    decode._named = counting
    rows = []
    for clip in clips:
        ours, theirs, decoded = [], [], 1.0

        def read(clip: Path = clip) -> torch.Tensor:
            reader = ClipReader(sampling, threads=threads)
            return frames_to_patches(reader.read(str(clip)).frames, processor.video_processor)

        def read_stock(clip: Path = clip) -> torch.Tensor:
            made = stock.get_mm_inputs([], [str(clip)], [], [0], [1], [0], [[]], stock_processor)
            return made["pixel_values_videos"]

        try:
            packets = probe(str(clip))[0].info.num_frames
            for _ in range(rounds):
                theirs.append(timed(read_stock)[:2])
                calls = 0
                ours.append(timed(read)[:2])
                decoded = min(1.0, calls / packets) if calls else 1.0
        except (ClipError, ValueError, OSError) as error:
            rows.append({"clip": clip.name, "refused": str(error)})
            print(f"{clip.name}: {error}")
            continue
        cpu, wall = (statistics.median(pair[i] for pair in ours) for i in (0, 1))
        stock_cpu, stock_wall = (statistics.median(pair[i] for pair in theirs) for i in (0, 1))
        row = {"clip": clip.name, "packets": packets, "share_decoded": round(decoded, 3)}
        row |= {"cpu_s": round(cpu, 4), "wall_s": round(wall, 4)}
        row |= {"stock_cpu_s": round(stock_cpu, 4), "stock_wall_s": round(stock_wall, 4)}
        row |= {"cpu_ratio": round(cpu / stock_cpu, 3), "wall_ratio": round(wall / stock_wall, 3)}
        rows.append(row)
        print(
            f"{clip.name:<40.40} {packets:>6} packets, {decoded:4.0%} decoded; CPU {cpu:7.3f} s of {stock_cpu:7.3f} = "
            f"{cpu / stock_cpu:5.2f}; wall {wall:7.3f} of {stock_wall:7.3f} = {wall / stock_wall:5.2f}",
            flush=True,
        )
    decode._named = named
    return rows


def cached_reads(clip: Path, processor: Any, sampling: Any, folder: Path, reads: int) -> dict[str, Any]:
    reader = ClipReader(sampling, FrameCache(folder, 1 << 33))
    plan = reader.read(str(clip)).plan
    torch.set_num_threads(1)
    spent, memory = [], []
    for i in tqdm(range(reads), desc="Cached reads"):
        cpu, _, _ = timed(lambda: frames_to_patches(reader.read(str(clip)).frames, processor.video_processor))
        spent.append(cpu)
        if i % (reads // 20) == 0:
            memory.append(memory_mib())
    result = {
        "tokens": plan.num_tokens,
        "cpu_ms": round(1000 * statistics.median(spent), 3),
        "reads": reads,
        "mib_after_a_tenth": round(memory[2], 1),
        "mib_at_the_end": round(memory[-1], 1),
    }
    print("cached read to patches:", result)
    return result


def records(clip: Path, processor: Any, sampling: Any, folder: Path, count: int) -> dict[str, Any]:
    """Records encoded per second, by one core: with probes in memory, in the cache on disk, and without."""
    torch.set_num_threads(1)
    conversations = []
    for i in range(count):
        own = folder / f"{i}{clip.suffix}"
        shutil.copyfile(clip, own)
        answer = {
            "video_description": f"主播使用凯在中路草丛蹲守，第{i}次击杀后推掉敌方二塔。",
            "tags": ["王者荣耀", "凯"],
        }
        turns = [
            {"from": "human", "value": "<video>\n描述这个视频并进行打标,使用json输出标签"},
            {"from": "gpt", "value": answer},
        ]
        conversation, _ = parse_record({"video": str(own), "conversations": turns}, lambda path: path)
        conversations.append(conversation)
    cache = FrameCache(folder / "cache", 1 << 33)
    result = {}
    reader = ClipReader(sampling, cache)
    for name in ("without probes", "probes on disk", "probes in memory"):
        if name == "probes on disk":
            reader = ClipReader(sampling, cache)
        encoder = Encoder(processor.tokenizer, processor, reader, cutoff_len=8192)
        if name == "without probes":
            encoder.encode(conversations[0])  # the tokenizer and the chat template warm up
        cpu, wall, _ = timed(lambda encoder=encoder: [encoder.encode(conversation) for conversation in conversations])
        result[name] = {"clips_a_second": round(count / wall, 1), "clips_a_cpu_second": round(count / cpu, 1)}
        print(f"record to ids, {name}: {count / wall:.0f} clips/s, {count / cpu:.0f} a CPU second")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="folder with the model's processor files")
    parser.add_argument("--clips", type=Path, help="folder of video files, for first reads beside the drawn ones")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2, help="decoder threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=5, help="length of the long recordings (default: %(default)s)"
    )
    parser.add_argument("--reads", type=int, default=10000, help="cached reads (default: %(default)s)")
    parser.add_argument("--records", type=int, default=2000, help="records encoded (default: %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    processor = AutoProcessor.from_pretrained(options.config)
    if not processor.tokenizer.chat_template:
        processor.tokenizer.chat_template = processor.chat_template
    sampling = apply_to_processor("qwen_finetune", KEYS, processor).clips
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        drawn = [folder / "720p30_15s.mp4", folder / "long_gop30.mp4", folder / "long_gop250.mp4"]
        draw_clip(drawn[0], 15, 720, 1280)
        draw_clip(drawn[1], 60 * options.minutes, 360, 640, gop=30)
        draw_clip(drawn[2], 60 * options.minutes, 360, 640, gop=250)
        given = sorted(path for path in options.clips.iterdir() if path.suffix != ".json") if options.clips else []
        result = {
            "first_reads": first_reads([*drawn, *given], processor, sampling, options.threads, options.rounds),
            "cached_read": cached_reads(drawn[0], processor, sampling, folder / "cache", options.reads),
            "records": records(drawn[0], processor, sampling, folder, options.records),
        }
    first = result["first_reads"][0]
    ratio = first["stock_cpu_s"] * 1000 / result["cached_read"]["cpu_ms"]
    result["cached_read"]["times_faster_than_stock"] = round(ratio)
    print(f"cached read against stock's read of {first['clip']}: {ratio:.0f} times less CPU")
    (options.out / "read_clips.json").write_text(json.dumps(result, indent=2, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
