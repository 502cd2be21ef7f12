"""Every clip of ../shared/videos is shown right or refused by name: seen from outside, from the batch alone.

A record goes through LLaMA-Factory's own loading and its collator. What comes out is turned back into frames and
times, and is compared with all frames of the file, decoded here by the plainest loop. Nothing of
`llamafactory_video.video` is used. Shown frames must equal resized frames of the file in every pixel (`TOLERANCE`).
"""

import functools
import itertools
import json
import logging
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from conftest import SHARED, write_clip
from llamafactory_video.demo.tiny_model import build_processor, save_tiny_model
from PIL import Image
from qwen_vl_utils.vision_process import smart_resize as utils_smart_resize
from torchvision.transforms import functional as float_transforms
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

FOLDER = SHARED / "videos"
TOLERANCE = 0  # mean absolute difference between a shown frame and the file's, in levels of 0..255
TICK = Fraction(2, 1000)  # containers round times, the coarsest of these clips' to milliseconds (seconds)
THUMB = 16  # side of the small pictures in which ways to turn a frame are compared
FORMS = list(itertools.product(range(4), (False, True)))  # quarter turns, and whether mirrored before; first: upright

DIALECTS = {
    "qwen_finetune": {"video_min_frames": 16, "video_min_pixels": 401408, "video_max_pixels": 1003520},
    "llamafactory": {"video_max_pixels": 31360},
    "qwen_vl_utils": {"video_min_pixels": 16384, "video_max_pixels": 31360},
}
COMMON = {"video_fps": 4, "video_max_frames": 32}
# Why a clip cannot be shown. qwen_vl_utils alone enlarges frames of one pixel.
REFUSED = {
    "moviepy__result.webm": "is not a video that can be read",
    "derived__no_moov.mp4": "is not a video that can be read",
    "media__sample_audio_only.mp4": "holds no video stream",
    "moviepy__bitmap.mp4": r"frames are (1 x 1|28 x 28); Qwen3-VL needs at least 32",
}
# What is said of a damaged clip, with the number of frames that can be shown.
LOSSES = {
    "decord__corrupted.mp4": r"damaged: (\d+) of 50 frames can be shown; \d+ are damaged",
    "derived__cut_mdat.mp4": r"only (\d+) of 524 frames can be read|damaged: (\d+) of \d+ frames can be shown; \d+ ",
}


# --- What the model is given -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """One clip as it stands in a batch: times (t,), pads behind each (t,), grid (t, h, w), patches, token types."""

    times: list[str]
    pads: list[int]
    grid: tuple[int, int, int]
    patches: torch.Tensor
    types: list[int]
    ids: list[int]
    pad_id: int

    @functools.cached_property
    def frames(self) -> np.ndarray:
        return unpatch(self.patches, self.grid)


def read_batch(batch: dict[str, Any], tokenizer: Any) -> Shown:
    assert len(batch["input_ids"]) == 1 and len(batch["video_grid_thw"]) == 1
    ids = batch["input_ids"][0].tolist()
    text = tokenizer.decode(ids, skip_special_tokens=False)
    runs = re.findall(r"<([^<>|]*) seconds><\|vision_start\|>((?:<\|video_pad\|>)+)<\|vision_end\|>", text)
    types = batch["mm_token_type_ids"][0].tolist() if "mm_token_type_ids" in batch else []
    return Shown(
        [time for time, _ in runs],
        [len(pads) // len("<|video_pad|>") for _, pads in runs],
        tuple(batch["video_grid_thw"][0].tolist()),
        batch["pixel_values_videos"],
        types,
        ids,
        tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )


def unpatch(patches: torch.Tensor, grid: tuple[int, int, int]) -> np.ndarray:
    """Patches (t * h * w, 3 * 2 * 16 * 16) with mean and deviation 0.5 -> frames (2 t, 16 h, 16 w, 3) uint8."""
    t, h, w = grid
    split = patches.numpy().reshape(t, h // 2, w // 2, 2, 2, 3, 2, 16, 16)
    # time, token row, token column, row and column in the token, colour, frame, row, column -> frames
    frames = split.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(2 * t, 16 * h, 16 * w, 3)
    levels = frames * 127.5 + 127.5
    frames = levels.round()
    assert np.abs(levels - frames).max() < 0.01, "pixels: not whole levels of 0..255"
    return frames.astype(np.uint8)


# --- What the file holds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """All frames of a file: upright thumbnails, times from the first, and frames by size.

    Attributes:
        seconds: presentation times as the file has them, exactly, (n,).
        height, width: as a player shows it, with the pixel aspect.
        degrees: quarter turns to the left that stand it upright, as ffprobe counts them.
        thumbs: (n, THUMB, THUMB, 3) float32.
        resized: by dialect, frames (H, W, 3) uint8 by their number.
    """

    seconds: list[Fraction]
    height: int
    width: int
    degrees: int
    thumbs: np.ndarray
    resized: dict[str, dict[int, np.ndarray]]

    @property
    def times(self) -> list[float]:
        return [float(second - self.seconds[0]) for second in self.seconds]

    @property
    def length(self) -> set[Fraction]:
        """Seconds until after the last frame; the least and the most where the container's ticks leave it open."""
        n = len(self.seconds)
        length = (self.seconds[-1] - self.seconds[0]) * Fraction(n, n - 1) if n > 1 else Fraction(1)
        constant = len({b - a for a, b in itertools.pairwise(self.seconds)}) == 1
        return {length} if constant else {length - TICK, length, length + TICK}


def decode_plainly(path: Path) -> Iterator[tuple[av.VideoFrame, Fraction, av.VideoStream]]:
    """Each frame of the first video stream that is whole, with its time in seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            try:
                frames = stream.decode(packet)
            except av.FFmpegError:
                continue
            for frame in frames:
                if not frame.is_corrupt:
                    stamp = frame.dts if frame.pts is None else frame.pts
                    yield frame, stamp * stream.time_base, stream


def rotation(frame: av.VideoFrame) -> int:
    """Degrees to the left that stand a frame upright, as FFmpeg's av_display_rotation_get has them."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0
    a, b, _, c, d, *_ = struct.unpack("<9i", bytes(matrix))
    assert a * d - b * c > 0, "mirrored: not met in these clips"
    return round(-math.degrees(math.atan2(b, a)))


def resized(frame: np.ndarray, dialect: str, size: tuple[int, int], before: tuple[int, int]) -> np.ndarray:
    """A frame (H, W, 3) uint8 at its size, as the dialect's reference computes it."""
    if dialect == "llamafactory":
        frame = np.asarray(Image.fromarray(frame).resize(before[::-1], Image.Resampling.BICUBIC))
    planes = torch.from_numpy(np.require(frame, requirements="CW")).permute(2, 0, 1)
    resize = float_transforms.resize if dialect == "qwen_vl_utils" else transforms.resize
    return resize(planes, list(size), InterpolationMode.BICUBIC, antialias=True).permute(1, 2, 0).numpy()


def first_size(height: int, width: int, least: int, most: int) -> tuple[int, int]:
    """Of LLaMA-Factory's own resize before the processor's."""
    for bound, wrong in ((most, height * width > most), (least, height * width < least)):
        if wrong:
            scale = math.sqrt(bound / (width * height))
            width, height = int(width * scale), int(height * scale)
    return max(height, 28), max(width, 28)


def hold(path: Path, sizes: dict[str, tuple[int, int]], every: bool = False) -> Held:
    """Decode a file, with its frames resized to the size of each dialect.

    All frames are kept in the first dialect. In others only those that may be shown and their neighbours are, to save
    time: a frame shown must equal one of them, so with fewer of them the checks are no less strict.
    """
    seconds = [second for _, second, _ in decode_plainly(path)]
    held = Held(seconds, 0, 0, 0, np.empty(0), {dialect: {} for dialect in sizes})
    kept = {dialect: set() for dialect in sizes}
    for dialect in sizes:
        rule = Rule(dialect, (0, 0))
        may = {number for count in rule.counts(held) for some in rule.wanted(held, count) for number in some}
        kept[dialect] = {number + near for number in may for near in (-1, 0, 1)}
    first = next(iter(sizes))
    for dialect in sizes if every else (first,):
        kept[dialect] = set(range(len(seconds)))
    thumbs, degrees, height, width = [], set(), 0, 0
    for number, (frame, _, stream) in enumerate(decode_plainly(path)):
        degrees.add(rotation(frame))
        turned = rotation(frame) // 90
        upright = np.rot90(frame.to_ndarray(format="rgb24"), turned)
        height, width = frame.height, round(frame.width * (stream.sample_aspect_ratio or 1))
        height, width = (width, height) if turned % 2 else (height, width)
        before = first_size(height, width, 256, DIALECTS["llamafactory"]["video_max_pixels"])
        for dialect, size in sizes.items():
            if number in kept[dialect]:
                held.resized[dialect][number] = resized(upright, dialect, size, before)
        thumbs.append(thumbnail(held.resized[first][number]))
    assert len(degrees) == 1
    return replace(held, height=height, width=width, degrees=degrees.pop(), thumbs=np.stack(thumbs))


def thumbnail(frame: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(frame).resize((THUMB, THUMB), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float32)


# --- What must be so -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A dialect's rule, on the real number of frames and the real rate."""

    dialect: str
    processor_pixels: tuple[int, int]

    def counts(self, held: Held) -> set[int]:
        """How many frames are to be sampled; more than one where the length is open."""
        n, found = len(held.seconds), set()
        for seconds in held.length:
            frames = seconds * COMMON["video_fps"]
            if self.dialect == "qwen_finetune":
                found.add(min(max(int(frames), 16), 32, n))
            elif self.dialect == "llamafactory":
                found.add(min(max(1, math.floor(frames)), 32, n))
            else:
                found.add(math.floor(min(max(frames, 4), 32, n) / 2) * 2)
        return found

    def size(self, held: Held, count: int) -> tuple[int, int]:
        """Height and width of the frames, by the references' own functions."""
        keys, even = DIALECTS[self.dialect], count + count % 2
        least, most = keys.get("video_min_pixels", 256), keys["video_max_pixels"]
        if self.dialect == "qwen_finetune":
            return smart_resize(count, held.height, held.width, 2, 32, least, most)
        if self.dialect == "llamafactory":
            return smart_resize(even, *first_size(held.height, held.width, least, most), 2, 32, *self.processor_pixels)
        return utils_smart_resize(held.height, held.width, 32, least, most)

    def wanted(self, held: Held, count: int) -> list[dict[int, float]]:
        """Which frames are right at each place, and when: the nearest to where the dialect's numbers would lie if evenly spaced.

        More than one where two are as near, or where a number lies halfway between two. Where frames are rare, the one on the
        screen, at that place's time: a gap of more than two places and ten usual frames.
        """
        times, n, right = np.array(held.times), len(held.seconds), []
        rare = times[-1] * max(2 / max(count - 1, 1), 10 / max(n - 1, 1))
        for number in np.linspace(0, n - 1, count) if count > 1 else [0.0]:
            shift, slack = (0, 1e-6) if self.dialect == "llamafactory" else (0.5, 1e-3)
            found: dict[int, float] = {}
            for rounded in {math.floor(number + shift - slack), math.floor(number + shift + slack)}:
                place = times[-1] * max(rounded, 0) / max(n - 1, 1)
                after = int(np.searchsorted(times, place))
                if 0 < after < n and times[after] - times[after - 1] > rare:
                    found[after - 1] = place
                else:
                    far = np.abs(times - place)
                    found |= {int(near): times[near] for near in np.flatnonzero(far <= far.min() + 1e-6)}
            right.append(found)
        return right + right[-1:] * (count % 2)


@functools.lru_cache(maxsize=2)
def _ways(thumbs: bytes, n: int) -> np.ndarray:
    frames = np.frombuffer(thumbs, np.float32).reshape(n, THUMB, THUMB, 3)
    return np.stack([np.rot90(frames[:, :, :: -1 if mirrored else 1], k, (1, 2)) for k, mirrored in FORMS])


def check_upright(shown: Shown, held: Held, rule: Rule) -> None:
    """1: of the ways to turn and mirror a frame, the upright one is like the frames shown."""
    ways = _ways(held.thumbs.tobytes(), len(held.thumbs)).reshape(len(FORMS), len(held.thumbs), -1)
    looks = np.stack([thumbnail(frame) for frame in shown.frames]).reshape(len(shown.frames), -1)
    far = [torch.cdist(torch.from_numpy(looks), torch.tensor(way), p=1).amin(1).mean().item() for way in ways]
    best = int(np.argmin(far))
    assert far[0] <= far[best] + 1e-3, f"upright: turned {90 * FORMS[best][0]} degrees, mirrored {FORMS[best][1]}"


def matches(shown: Shown, held: Held, rule: Rule) -> list[tuple[set[int], float]]:
    """For each frame shown those of the file that are nearest, and how far (mean difference in levels)."""
    frames = held.resized[rule.dialect]
    size = next(iter(frames.values())).shape
    assert size == shown.frames.shape[1:], f"pixels: of size {shown.frames.shape}, not {size}"
    numbers: dict[bytes, set[int]] = {}
    for number, frame in frames.items():
        numbers.setdefault(frame.tobytes(), set()).add(number)
    found = []
    for frame in shown.frames:
        same = numbers.get(frame.tobytes())
        if same is None:
            far = {number: np.abs(frame.astype(np.int16) - other).mean() for number, other in frames.items()}
            found.append(({number for number in far if far[number] == min(far.values())}, float(min(far.values()))))
        else:
            found.append((same, 0.0))
    return found


def check_pixels(shown: Shown, held: Held, rule: Rule) -> None:
    """Each frame shown is one of the file's, resized as the dialect says."""
    far = max(distance for _, distance in matches(shown, held, rule))
    assert far <= TOLERANCE, f"pixels: {far:.3f} levels off the nearest frame of the file"


def chosen(shown: Shown, held: Held, rule: Rule) -> tuple[list[int], list[dict[int, float]]]:
    """The numbers of the frames shown, and what is right there; of frames that are alike, a right one is taken."""
    alike = [same for same, _ in matches(shown, held, rule)]
    best = [], []
    for count in rule.counts(held):
        right = rule.wanted(held, count)
        if len(right) == len(alike):
            numbers = [min(same & good.keys() or same) for same, good in zip(alike, right, strict=True)]
            if not best[0] or all(number in good for number, good in zip(numbers, right, strict=True)):
                best = numbers, right
    return best if best[0] else ([min(same) for same in alike], rule.wanted(held, len(alike)))


def check_spread(shown: Shown, held: Held, rule: Rule) -> None:
    """2: frames in order of time, each the nearest to its wanted time between the first and the last."""
    numbers, right = chosen(shown, held, rule)
    assert numbers == sorted(numbers), f"spread: frames are not in order, {numbers}"
    for place, (number, good) in enumerate(zip(numbers, right, strict=True)):
        assert number in good, f"spread: frame {number} in place {place}, not {sorted(good)}"


def check_times(shown: Shown, held: Held, rule: Rule) -> None:
    """3: each time in the prompt is the mean of its two frames' real times, as far as it is printed."""
    times = [good.get(number, held.times[number]) for number, good in zip(*chosen(shown, held, rule), strict=True)]
    real = [(a + b) / 2 for a, b in zip(times[::2], times[1::2], strict=True)]
    assert len(real) == len(shown.times), f"times: {len(shown.times)} for {len(real)} pairs of frames"
    off = max(abs(float(said) - time) for said, time in zip(shown.times, real, strict=True))
    assert off <= 0.05 + float(TICK), f"times: {off:.2f} s off"
    assert all(re.fullmatch(r"\d+\.\d", time) for time in shown.times), f"times: printed as {shown.times}"


def check_tokens(shown: Shown, held: Held, rule: Rule) -> None:
    """4: as many times, pads, token types and rows of pixels as the grid says."""
    t, h, w = shown.grid
    assert shown.pads == [h * w // 4] * t, f"tokens: {shown.pads} pads for a grid of {shown.grid}"
    assert shown.ids.count(shown.pad_id) == t * h * w // 4, "tokens: pads that stand behind no time"
    assert shown.types == [2 * (token == shown.pad_id) for token in shown.ids], "tokens: types disagree with pads"
    assert shown.patches.shape == (t * h * w, 3 * 2 * 16 * 16), (
        f"tokens: pixels {shown.patches.shape} for {shown.grid}"
    )


def check_count(shown: Shown, held: Held, rule: Rule) -> None:
    """5: as many frames as the dialect says, for what the file really holds, in an even number."""
    wanted = {count + count % 2 for count in rule.counts(held)}
    assert 2 * shown.grid[0] in wanted, f"count: {2 * shown.grid[0]} frames, not {wanted}"


def check_size(shown: Shown, held: Held, rule: Rule) -> None:
    """The size that the reference's own function gives for the frame as a player shows it."""
    size = tuple(16 * side for side in shown.grid[1:])
    wanted = {tuple(rule.size(held, count)) for count in rule.counts(held)}
    assert size in wanted, f"size: {size}, not {wanted}"


CHECKS = [check_tokens, check_count, check_size, check_upright, check_pixels, check_spread, check_times]


def check(shown: Shown, held: Held, rule: Rule, checks: Sequence[Callable] = CHECKS) -> None:
    for one in checks:
        one(shown, held, rule)


# --- Through LLaMA-Factory -------------------------------------------------------------------------------------------


class Trainer:
    """LLaMA-Factory's data set and collator for some clips of one folder, in one recipe.

    Args:
        model: folder of a model's tokenizer and processor.
        first: a good clip; LLaMA-Factory prints the first record when it loads.
    """

    def __init__(self, work: Path, clips: Path, names: list[str], first: str, model: Path, **keys: Any) -> None:
        from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset, get_template_and_fix_tokenizer
        from llamafactory.hparams import get_train_args
        from llamafactory.model import load_tokenizer
        from transformers import AutoConfig, AutoModelForImageTextToText

        self.names, self.said = [first, *(name for name in names if name != first)], {}
        work.mkdir(parents=True)
        turns = [{"from": "human", "value": "<video>\nwhat"}, {"from": "gpt", "value": "that"}]
        form = {
            "file_name": "clips.json",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "videos": "videos"},
        }
        if keys["template"] == "qwen3_vl_video":
            form = {"file_name": "clips.json", "formatting": "video_conversation"}
        records = [{"videos": [name], "conversations": turns} for name in self.names]
        (work / "clips.json").write_text(json.dumps(records))
        (work / "dataset_info.json").write_text(json.dumps({"clips": form}))
        recipe = {
            **{"model_name_or_path": str(model), "dataset": "clips", "dataset_dir": str(work), "stage": "sft"},
            **{"media_dir": str(clips), "output_dir": str(work / "out"), "cache_dir": str(work / "cache")},
            **{"do_train": True, "report_to": "none", "cutoff_len": 100000, **keys},
        }
        model_args, data_args, training_args, _, _ = get_train_args(recipe)
        module = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
        self.data = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"]
        with torch.device("meta"):  # the collator asks it for positions, which need no weights
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(model))
        self.collator = SFTDataCollatorWith4DAttentionMask(
            template=template, model=model, pad_to_multiple_of=8, label_pad_token_id=-100, **module
        )
        self.tokenizer, size = module["tokenizer"], module["processor"].video_processor.size
        self.processor_pixels = size["shortest_edge"], size["longest_edge"]

    def batch(self, name: str) -> dict[str, Any]:
        return self.collator([self.data[self.names.index(name)]])

    @functools.cache  # noqa: B019
    def shown(self, name: str) -> Shown | Exception:
        """A clip as it is shown, or why it is not. What was logged meanwhile is in `said`."""
        lines: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: lines.append(record.getMessage())
        logging.getLogger().addHandler(handler)
        try:
            return read_batch(self.batch(name), self.tokenizer)
        except Exception as error:
            return error
        finally:
            logging.getLogger().removeHandler(handler)
            self.said[name] = "\n".join(lines)


# --- Real clips ------------------------------------------------------------------------------------------------------

MANIFEST = json.loads((FOLDER / "MANIFEST.json").read_text()) if (FOLDER / "MANIFEST.json").is_file() else []
FACTS = {facts["name"]: facts for facts in MANIFEST}
ABSENT = pytest.mark.skip(reason="the real clips (../shared/videos) are not present")
GOOD = "llama-factory__1.mp4"
# One of each kind: plain, turned, of a variable rate, another codec, damaged, refused.
FEW = {
    *(GOOD, "decord__video_90.mov", "media__sample_android_slow_motion.mp4", "gradio__video_sample.webm"),
    *("derived__cut_mdat.mp4", "moviepy__bitmap.mp4"),
}
NAMES = sorted(FACTS)
CASES = [pytest.param(name, marks=[] if name in FEW else pytest.mark.thorough) for name in NAMES]
CASES = CASES or [pytest.param("", marks=ABSENT)]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Callable[[str], Trainer]:
    """A recipe of each dialect over all clips, made when it is asked for."""
    folder = tmp_path_factory.mktemp("real")

    @functools.cache
    def make(dialect: str) -> Trainer:
        if not (folder / "model").is_dir():
            save_tiny_model(folder / "model")
        keys = {"template": "qwen3_vl_video", "video_sampling": dialect, **COMMON, **DIALECTS[dialect]}
        return Trainer(folder / dialect, FOLDER, NAMES, GOOD, folder / "model", **keys)

    return make


@pytest.mark.parametrize("name", CASES)
def test_each_clip_is_right_or_refused_by_name(trainer, name):
    found = {dialect: trainer(dialect).shown(name) for dialect in DIALECTS}
    shown = {dialect: clip for dialect, clip in found.items() if isinstance(clip, Shown)}
    expected = {"qwen_vl_utils"} if name == "moviepy__bitmap.mp4" else set(() if name in REFUSED else DIALECTS)
    for dialect in found.keys() - shown.keys():
        assert dialect not in expected, f"{dialect}: {found[dialect]}"
        assert re.search(rf"{re.escape(name)}: .*{REFUSED[name]}", str(found[dialect]))
    assert shown.keys() == expected
    if not shown:
        return
    inside = name == "decord__corrupted.mp4"  # damaged inside, not cut off
    held = hold(FOLDER / name, {dialect: clip.frames.shape[1:3] for dialect, clip in shown.items()}, every=inside)
    for dialect, clip in shown.items():
        # Of a file damaged inside, the plain loop holds pictures that the decoder made up: nothing to count or time by.
        checks = [check_tokens, check_upright, check_pixels] if inside else CHECKS
        check(clip, held, Rule(dialect, trainer(dialect).processor_pixels), checks)
        said = trainer(dialect).said[name]
        if name in LOSSES:
            told = re.findall(rf"{re.escape(name)}: (?:{LOSSES[name]})", said)
            count = int("".join(itertools.chain(*told[-1:])))
            assert count == len(held.seconds) or (inside and 16 <= count < 50), f"warned: {said!r}"
        else:
            assert name not in said, f"warned: {said!r}"
    _check_facts(held, FACTS[name], damaged=name in LOSSES)
    if "qwen_finetune" in shown:  # the second time its frames come from the cache
        again = read_batch(trainer("qwen_finetune").batch(name), trainer("qwen_finetune").tokenizer)
        assert again.ids == shown["qwen_finetune"].ids
        assert torch.equal(again.patches, shown["qwen_finetune"].patches)


def _check_facts(held: Held, facts: dict[str, Any], damaged: bool) -> None:
    """7: what this file's own decoding found is what was measured with other tools."""
    counts = facts["decoded_frames_ffmpeg5"], facts["decoded_frames_pyav16"]
    assert len(held.seconds) in (range(min(counts), max(counts) + 1) if damaged else counts)
    assert (held.degrees - facts["rotation"]) % 360 == 0
    assert float(held.seconds[0]) == pytest.approx(facts["pyav_first_pts"], abs=0.002)
    if not damaged:
        assert float(held.seconds[-1]) == pytest.approx(facts["pyav_last_pts"], abs=0.002)


@pytest.mark.skipif(not FACTS, reason="the real clips (../shared/videos) are not present")
def test_the_manifest_lists_what_is_refused():
    unreadable = {name for name, facts in FACTS.items() if not facts["decoded_frames_pyav16"]}
    small = {name for name, facts in FACTS.items() if facts["width"] and min(facts["width"], facts["height"]) < 28}
    assert len(FACTS) == 52 and unreadable | small == set(REFUSED)
    assert {name for name, facts in FACTS.items() if facts["pyav_error"]} - unreadable == set(LOSSES)


@pytest.mark.skipif(not FACTS or not (SHARED / "qwen3vl").is_dir(), reason="../shared is not present")
@pytest.mark.thorough
def test_with_the_real_tokenizer(tmp_path):
    """Plain, sideways, upside down and of variable rate, without time stamps, and one that begins late."""
    names = ["llama-factory__4.mp4", "metadata-extra__with-gps.mov", "moviepy__fire2.mp4", "llama-factory__2.avi"]
    names += ["torchcodec__test_non_zero_start.mp4"]
    keys = {**COMMON, **DIALECTS["qwen_finetune"], "template": "qwen3_vl_video", "video_sampling": "qwen_finetune"}
    real = Trainer(tmp_path / "real", FOLDER, names, names[0], SHARED / "qwen3vl", **keys)
    for name in names:
        shown = real.shown(name)
        assert isinstance(shown, Shown), shown
        held = hold(FOLDER / name, {"qwen_finetune": shown.frames.shape[1:3]})
        check(shown, held, Rule("qwen_finetune", real.processor_pixels))


# --- The checker itself ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[dict[str, Any], Any, Held, Rule]:
    """A batch of a clip written by the code, its tokenizer, what the file holds, and the rule for it."""
    folder = tmp_path_factory.mktemp("drawn")
    save_tiny_model(folder / "model")
    write_clip(folder / "clip.mp4", frames=30, fps=10, size=(64, 96))
    keys = {**COMMON, **DIALECTS["qwen_finetune"], "template": "qwen3_vl_video", "video_sampling": "qwen_finetune"}
    trainer = Trainer(folder / "data", folder, ["clip.mp4"], "clip.mp4", folder / "model", **keys)
    batch = trainer.batch("clip.mp4")
    size = read_batch(batch, trainer.tokenizer).frames.shape[1:3]
    held = hold(folder / "clip.mp4", {"qwen_finetune": size})
    return batch, trainer.tokenizer, held, Rule("qwen_finetune", trainer.processor_pixels)


def patch(frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames (T, H, W, 3) uint8 as transformers' own processor makes patches of them, and their grid."""
    made = build_processor().video_processor(
        [torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)],
        do_resize=False,
        do_sample_frames=False,
        return_tensors="pt",
    )
    return made["pixel_values_videos"], made["video_grid_thw"]


def test_unpatch_is_the_inverse_of_transformers():
    frames = np.random.default_rng(0).integers(0, 256, (6, 64, 96, 3), np.uint8)
    patches, grid = patch(frames)
    assert grid.tolist() == [[3, 4, 6]]
    assert np.array_equal(unpatch(patches, tuple(grid[0].tolist())), frames)


def test_a_drawn_clip_passes(drawn):
    batch, tokenizer, held, rule = drawn
    shown = read_batch(batch, tokenizer)
    check(shown, held, rule)
    assert len(shown.frames) == 16 and len(held.seconds) == 30


def _with_frames(batch: dict[str, Any], change: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    grid = tuple(batch["video_grid_thw"][0].tolist())
    patches, made = patch(change(unpatch(batch["pixel_values_videos"], grid)))
    return {**batch, "pixel_values_videos": patches, "video_grid_thw": made}


def _swap(frames: np.ndarray) -> np.ndarray:
    frames = frames.copy()
    frames[[4, 10]] = frames[[10, 4]]
    return frames


def _later(frames: np.ndarray) -> np.ndarray:
    frames = frames.copy()
    frames[4] = frames[5]
    return frames


def _darker(frames: np.ndarray) -> np.ndarray:
    return np.where(frames > 0, frames - 1, 0).astype(np.uint8)


@pytest.mark.parametrize(
    ("change", "one", "said"),
    [
        (lambda frames: frames[:, ::-1, ::-1], check_upright, "upright: turned 180 degrees, mirrored False"),
        (lambda frames: frames[:, :, ::-1], check_upright, "upright: turned 0 degrees, mirrored True"),
        (lambda frames: frames[:, ::-1], check_upright, "upright: turned 180 degrees, mirrored True"),
        (lambda frames: np.rot90(frames, 1, (1, 2)), check_upright, "upright: turned 90 degrees, mirrored False"),
        (lambda frames: np.rot90(frames, 1, (1, 2)), check_size, "size: "),
        (_darker, check_pixels, "pixels: "),
        (_swap, check_spread, "spread: frames are not in order"),
        (_later, check_spread, "spread: frame .* in place 4"),
        (lambda frames: frames[::-1], check_spread, "spread: "),
        (lambda frames: np.roll(frames, 2, axis=0), check_times, "times: "),
        (lambda frames: frames[:-2], check_count, r"count: 14 frames, not \{16\}"),
        (lambda frames: frames[:-2], check_tokens, "tokens: "),
    ],
)
def test_wrong_frames_are_seen(drawn, change, one, said):
    batch, tokenizer, held, rule = drawn
    shown = read_batch(_with_frames(batch, change), tokenizer)
    with pytest.raises(AssertionError, match=said):
        one(shown, held, rule)
    with pytest.raises(AssertionError):
        check(shown, held, rule)


def _with_times(batch: dict[str, Any], tokenizer: Any, change: Callable[[float], str]) -> dict[str, Any]:
    text = tokenizer.decode(batch["input_ids"][0], skip_special_tokens=False)
    text = re.sub(r"<([\d.]+) seconds>", lambda found: f"<{change(float(found[1]))} seconds>", text)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    pad_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    return {**batch, "input_ids": ids, "mm_token_type_ids": 2 * (ids == pad_id)}


@pytest.mark.parametrize("change", [lambda t: f"{t + 0.1:.1f}", lambda t: f"{1.1 * t:.1f}", lambda t: f"{t:.2f}"])
def test_wrong_times_are_seen(drawn, change):
    batch, tokenizer, held, rule = drawn
    check(read_batch(_with_times(batch, tokenizer, lambda t: f"{t:.1f}"), tokenizer), held, rule)
    shown = read_batch(_with_times(batch, tokenizer, change), tokenizer)
    with pytest.raises(AssertionError, match="times: "):
        check(shown, held, rule)


def test_wrong_tokens_are_seen(drawn):
    batch, tokenizer, held, rule = drawn
    shown = read_batch(batch, tokenizer)
    place = shown.ids.index(shown.pad_id)
    wrong = [
        replace(shown, pads=[shown.pads[0] - 1, *shown.pads[1:]]),
        replace(shown, types=[0] * len(shown.types)),
        replace(shown, types=[]),
        replace(shown, patches=shown.patches[:-4]),
        replace(shown, grid=(shown.grid[0], shown.grid[2], shown.grid[1] + 2)),
        replace(shown, ids=[*shown.ids, shown.pad_id], types=[*shown.types, 2]),
        read_batch({**batch, "input_ids": _without(batch["input_ids"], place)}, tokenizer),
    ]
    for clip in wrong:
        with pytest.raises(AssertionError, match="tokens: "):
            check(clip, held, rule)


def _without(ids: torch.Tensor, place: int) -> torch.Tensor:
    return torch.cat([ids[:, :place], ids[:, place + 1 :]], 1)
