"""What of a clip is shown: arithmetic on a clip's length, rate and size, with no file opened.

`plan_frames` turns a `ClipInfo` (what the file holds) and a `Sampling` (what was asked for) into a `FramePlan`
(which frames, at which times, at which size). Tokenising, collating, chat and evaluation all ask this one
function, so what the model is told can never differ from what it is shown.

Three dialects give the numbers their meaning: `qwen_finetune` (transformers' Qwen3VLVideoProcessor, which the official
trainer uses), `qwen_vl_utils` (the package of that name, 0.0.14) and `llamafactory` (LLaMA-Factory 0.9.5).
"""

import bisect
import functools
import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch

DIALECTS = ("llamafactory", "qwen_finetune", "qwen_vl_utils")
# LLaMA-Factory pre-shrinks frames with PIL before the processor's own resize, never below this side (pixels).
_LLAMAFACTORY_MIN_SIDE = 28
# Bounds that qwen-vl-utils takes for granted, in visual tokens.
_UTILS_IMAGE_TOKENS = (4, 16384)
_UTILS_FRAME_TOKENS = (128, 768)
_UTILS_CONTEXT_TOKENS = 128000  # nine tenths of it are for a clip
_UTILS_ONLY = ("total_pixels", "nframes", "resized_height", "resized_width")
_TIME_TOKENS = 16  # <1234.5 seconds> and the marks around the pads take fewer


class SamplingError(ValueError):
    """A clip, or a setting, from which no frames can be planned."""


@dataclass(frozen=True)
class ClipInfo:
    """What a clip holds, as counted from its packets.

    Attributes:
        num_frames: frames that the clip yields when decoded.
        fps: average frame rate, in frames per second.
        duration: in seconds.
        height, width: frame size in pixels, as a player shows it.
        times: presentation time of every frame in seconds, from the first one; empty where index / fps gives them.
        header_fps: the average rate that the file's header states, which the references divide by; None if as `fps`.
        pictures: frames given as a list of pictures.
    """

    num_frames: int
    fps: float
    duration: float
    height: int
    width: int
    times: tuple[float, ...] = ()
    header_fps: float | None = None
    pictures: bool = False

    def time(self, index: int) -> float:
        """Seconds from the first frame to frame `index`."""
        return self.times[index] if self.times else index / self.fps


@dataclass(frozen=True)
class Sampling:
    """How frames are asked for.

    Attributes:
        dialect: one of `DIALECTS`: whose meaning the numbers have.
        fps: frames to sample per second.
        min_frames, max_frames: bounds on the number of frames.
        min_pixels, max_pixels: bounds; in `qwen_finetune` on the whole clip (frames x height x width), else on a frame;
            None stands for the default of `qwen_vl_utils`.
        timestamps: `pts`: frames nearest to the wanted times, and the times at which they are really shown; `index`:
            as the references, which take frame numbers / average rate for times. Alike where the rate is constant.
        total_pixels: bound on the whole clip (`qwen_vl_utils` only); None: its default, 0.9 * 128000 tokens.
        nframes: number of frames, in place of fps (`qwen_vl_utils` only).
        resized_height, resized_width: size of the frames, in place of the pixel bounds (`qwen_vl_utils` only).
        processor_min_pixels, processor_max_pixels: the processor's own clip-wide bounds (`llamafactory` only).
        image_bounds: least and greatest pixels of an image, where the dialect resizes images before the processor.
        patch_size, temporal_patch_size, merge_size: of the vision tower.
    """

    dialect: str = "qwen_finetune"
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int | None = 4096
    max_pixels: int | None = 25165824
    timestamps: str = "pts"
    total_pixels: int | None = None
    nframes: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    processor_min_pixels: int = 4096
    processor_max_pixels: int = 25165824
    image_bounds: tuple[int, int] | None = None
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2

    def __post_init__(self) -> None:
        if self.dialect not in DIALECTS:
            raise SamplingError(f"video_sampling is {self.dialect}; known are {', '.join(DIALECTS)}")
        if self.timestamps not in ("pts", "index"):
            raise SamplingError(f"video_timestamps is {self.timestamps}; known are pts, index")
        if not 0 < self.fps < math.inf:
            raise SamplingError(f"video_fps is {self.fps}; it must be above 0")
        if not 1 <= self.min_frames <= self.max_frames:
            raise SamplingError(
                f"video_min_frames is {self.min_frames} and video_max_frames {self.max_frames}; "
                "needed: 1 <= video_min_frames <= video_max_frames"
            )
        least = 1 if self.min_pixels is None else self.min_pixels
        if not 0 < least <= (least if self.max_pixels is None else self.max_pixels):
            raise SamplingError(
                f"video_min_pixels is {self.min_pixels} and video_max_pixels {self.max_pixels}; "
                "needed: 0 < video_min_pixels <= video_max_pixels"
            )
        for name in _UTILS_ONLY:
            value = getattr(self, name)
            if value is not None and self.dialect != "qwen_vl_utils":
                raise SamplingError(f"{name} has a meaning in video_sampling: qwen_vl_utils alone, not {self.dialect}")
            if value is not None and value < 1:
                raise SamplingError(f"{name} is {value}; it must be above 0")
        if (self.resized_height is None) != (self.resized_width is None):
            raise SamplingError("resized_height and resized_width belong together; one of them is missing")

    @property
    def factor(self) -> int:
        """Pixels of a visual token's side."""
        return self.patch_size * self.merge_size

    def override(self, **settings: Any) -> "Sampling":
        """The same with those of the named settings that are not None; a bound that they cross moves with them."""
        given = {key: value for key, value in settings.items() if value is not None}
        for least, most in (("min_frames", "max_frames"), ("min_pixels", "max_pixels")):
            for own, other, crossed in ((most, least, operator.lt), (least, most, operator.gt)):
                bound = getattr(self, other)
                if own in given and other not in given and bound is not None and crossed(given[own], bound):
                    given[other] = given[own]
        return replace(self, **given) if given else self


@dataclass(frozen=True)
class FramePlan:
    """The frames that are shown, before any is decoded.

    Attributes:
        indices: frame numbers in presentation order, an even count (an odd one repeats its last frame), (T,).
        times: seconds from the start of the clip, (T,).
        height, width: size of the frames shown, in pixels.
        grid: patches (t, h, w), with t = T / temporal_patch_size.
        merge_size: patches merged into a token, per side.
        pre_size: (height, width) of a first resize by PIL, in the dialect that has one.
        float_resize: the resize is computed in float32, as qwen-vl-utils does it; else in uint8, as transformers does.
    """

    indices: tuple[int, ...]
    times: tuple[float, ...]
    height: int
    width: int
    grid: tuple[int, int, int]
    merge_size: int = 2
    pre_size: tuple[int, int] | None = None
    float_resize: bool = False

    @property
    def tokens_per_timestamp(self) -> int:
        """Visual tokens behind each time that the prompt names."""
        return self.grid[1] * self.grid[2] // self.merge_size**2

    @property
    def num_tokens(self) -> int:
        """Visual tokens of the whole clip."""
        return self.grid[0] * self.tokens_per_timestamp

    @property
    def timestamps(self) -> list[float]:
        """Seconds that the prompt names: the mean of each temporal patch's first and last frame, (t,)."""
        size = len(self.times) // self.grid[0]
        return [(self.times[i] + self.times[i + size - 1]) / 2 for i in range(0, len(self.times), size)]


def mean_rate(frames: int, seconds: float) -> float:
    """Frames per second where the last of some frames begins so many seconds after the first.

    Rounded, for times such as 0.1666…: int(n / 6.0000001 * fps) would be one frame short.
    """
    return round((frames - 1) / seconds, 6)


def smart_resize(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    num_frames: int = 1,
    temporal_factor: int = 1,
) -> tuple[int, int]:
    """The size nearest to (height, width), in multiples of `factor`, within the pixel bounds.

    Follows `smart_resize` of transformers' Qwen3-VL video processor; with one frame, that of its image processor.

    Args:
        min_pixels, max_pixels: bounds on frames x height x width.
        num_frames: frames shown.
        temporal_factor: frames in a temporal patch.

    Returns:
        (height, width) in pixels.

    Raises:
        SamplingError: if one side is over 200 times the other.
    """
    _check_ratio(height, width)
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    frames = math.ceil(num_frames / temporal_factor) * temporal_factor
    if frames * new_height * new_width > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif frames * new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def utils_smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """The size nearest to (height, width), as `smart_resize` of qwen-vl-utils 0.0.14, (height, width) in pixels.

    It differs from transformers' in frames smaller than half the factor, and in where it stops shrinking.

    Raises:
        SamplingError: if one side is over 200 times the other, or no size within the bounds is left.
    """
    _check_ratio(height, width)
    if max_pixels < min_pixels:
        raise SamplingError(
            f"max_pixels {max_pixels:g} is below min_pixels {min_pixels:g}; raise or lower one of them"
        )
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = math.floor(height / shrink / factor) * factor
        new_width = math.floor(width / shrink / factor) * factor
        if not new_height * new_width:
            raise SamplingError(f"max_pixels {max_pixels:g} leaves nothing of a frame of {width} x {height}; raise it")
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def utils_frame_bounds(sampling: Sampling, frames: int) -> tuple[int, float]:
    """Least pixels of a frame in `qwen_vl_utils`, and the limit above which its max_pixels has no effect.

    Args:
        frames: shown of the clip.
    """
    token = sampling.factor**2
    least = sampling.min_pixels or _UTILS_FRAME_TOKENS[0] * token
    total = sampling.total_pixels or _UTILS_CONTEXT_TOKENS * token * 0.9
    return least, max(min(_UTILS_FRAME_TOKENS[1] * token, total / frames * 2), int(least * 1.05))


def _check_ratio(height: int, width: int) -> None:
    if max(height, width) > 200 * min(height, width):
        raise SamplingError(f"frames are {width} x {height}; one side may be at most 200 times the other")


def llamafactory_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size of LLaMA-Factory's first resize, (height, width); follows its Qwen2VLPlugin._preprocess_image."""
    if width * height > max_pixels:
        scale = math.sqrt(max_pixels / (width * height))
        width, height = int(width * scale), int(height * scale)
    if width * height < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        width, height = int(width * scale), int(height * scale)
    width, height = max(width, _LLAMAFACTORY_MIN_SIDE), max(height, _LLAMAFACTORY_MIN_SIDE)
    if width > 200 * height:
        width = height * 180
    if height > 200 * width:
        height = width * 180
    return height, width


def image_size(height: int, width: int, sampling: Sampling) -> tuple[int, int] | None:
    """The size to which the dialect resizes an image before the processor does, (height, width); None if it does not."""
    if sampling.image_bounds is None:
        return None
    if sampling.dialect == "qwen_vl_utils":
        return utils_smart_resize(height, width, sampling.factor, *sampling.image_bounds)
    return llamafactory_size(height, width, *sampling.image_bounds)


def tokens_of_image(height: int, width: int, sampling: Sampling, least: int, most: int) -> int:
    """Visual tokens of an image.

    Args:
        least, most: pixels that the image processor allows.

    Raises:
        SamplingError: if one side is over 200 times the other.
    """
    height, width = image_size(height, width, sampling) or (height, width)
    if sampling.dialect != "qwen_vl_utils":
        height, width = smart_resize(height, width, sampling.factor, least, most)
    return height * width // sampling.factor**2


def select_span(info: ClipInfo, sampling: Sampling, start: float | None, end: float | None) -> range:
    """The frame numbers between two times, in seconds; None leaves that side open.

    In `qwen_vl_utils` as there: start <= time <= end, and more than one frame. Else start <= time < end.

    Raises:
        SamplingError: if there are none.
    """
    n = info.num_frames
    if start is None and end is None:
        return range(n)
    if sampling.dialect == "qwen_vl_utils":
        if info.times:
            first = 0 if start is None else bisect.bisect_left(info.times, start)
            last = n - 1 if end is None else bisect.bisect_right(info.times, end) - 1
        else:
            seconds = n / info.fps
            first = 0 if start is None else math.ceil(max(0.0, min(start, seconds)) * info.fps)
            last = n - 1 if end is None else min(math.floor(min(end, seconds) * info.fps), n - 1)
        enough = first < last
    else:
        first = 0 if start is None else bisect.bisect_left(range(n), start, key=info.time)
        last = n - 1 if end is None else bisect.bisect_left(range(n), end, key=info.time) - 1
        enough = first <= last
    if not enough:
        raise SamplingError(
            f"{'fewer than two frames lie' if sampling.dialect == 'qwen_vl_utils' else 'no frame lies'} between start "
            f"and end; the last one is at {info.time(n - 1):.2f} s"
        )
    return range(first, last + 1)


def count_frames(n: int, fps: float, duration: float, sampling: Sampling) -> int:
    """How many of a clip's `n` frames the dialect asks for, before an odd count is evened out.

    Raises:
        SamplingError: if the clip is too short for the dialect.
    """
    if sampling.dialect == "qwen_finetune":
        return min(max(int(n / fps * sampling.fps), sampling.min_frames), sampling.max_frames, n)
    if sampling.dialect == "llamafactory":
        return min(max(sampling.min_frames, math.floor(duration * sampling.fps)), sampling.max_frames, n)
    if sampling.nframes is not None:
        count = round(sampling.nframes / 2) * 2
    else:
        least, most = math.ceil(sampling.min_frames / 2) * 2, math.floor(sampling.max_frames / 2) * 2
        count = math.floor(min(max(n / fps * sampling.fps, least), most, n) / 2) * 2
    if not 2 <= count <= n:
        raise SamplingError(
            f"qwen_vl_utils shows at least 2 frames and no more than the clip has; {count} of {n} asked"
        )
    return count


def sample_positions(n: int, count: int, sampling: Sampling, first: int = 0) -> list[int]:
    """`count` evenly spread frame numbers from `first` to `first + n - 1`, as the dialect rounds them."""
    if sampling.dialect == "qwen_vl_utils":
        return torch.linspace(first, first + n - 1, count).round().long().tolist()
    # Spread from 0, as over a file that was cut out: halves round to the even number. This is numpy.linspace to the
    # bit, without the time that it takes over short lists.
    step = (n - 1) / (count - 1) if count > 1 else 0.0
    spread = [i * step for i in range(count - 1)] + [float(n - 1) if count > 1 else 0.0]
    to_number = int if sampling.dialect == "llamafactory" else round
    return [first + to_number(number) for number in spread]


def _nearest(times: tuple[float, ...], span: range, positions: list[int]) -> list[int]:
    """The frames shown nearest to where `positions` would lie if all frames of the span were equally long."""
    begin, length = times[span[0]], times[span[-1]] - times[span[0]]
    found = []
    for position in positions:
        wanted = begin + length * (position - span[0]) / (len(span) - 1)
        after = bisect.bisect_left(times, wanted, span.start, span.stop - 1)
        before = max(after - 1, span[0])
        found.append(before if wanted - times[before] <= times[after] - wanted else after)
    return found


def plan_frames(info: ClipInfo, sampling: Sampling, start: float | None = None, end: float | None = None) -> FramePlan:
    """Plan what is shown of a clip.

    Args:
        start, end: seconds; only what lies between is shown (`select_span`). Times count from the first frame of the
            span, in `qwen_vl_utils` from the first frame of the file.

    Raises:
        SamplingError: if the clip has no frames, or a size that the vision tower cannot take.
    """
    if info.num_frames < 1:
        raise SamplingError("no video frames")
    if sampling.timestamps == "index" and not info.pictures:
        info = replace(info, times=(), fps=info.header_fps or info.fps)
    utils = sampling.dialect == "qwen_vl_utils"
    span = select_span(info, sampling, start, end)
    n = len(span)
    if utils and info.pictures:
        indices = list(span)  # a list of pictures counts as sampled already
    elif info.times and info.times[span[-1]] > info.times[span[0]]:
        fps = mean_rate(n, info.times[span[-1]] - info.times[span[0]])
        count = count_frames(n, fps, n / fps, sampling)
        indices = _nearest(info.times, span, sample_positions(n, count, sampling, span[0]))
    else:
        duration = info.duration if n == info.num_frames else n / info.fps
        count = count_frames(n, info.fps, duration, sampling)
        indices = sample_positions(n, count, sampling, span[0])
    sampled = len(indices)
    indices += indices[-1:] * (-sampled % sampling.temporal_patch_size)
    origin = 0 if utils else span[0]
    if info.times:
        times = [info.times[i] - info.times[origin] for i in indices]
    else:
        # qwen-vl-utils repeats the last of an odd number of pictures under the next number, not under its own.
        numbers = range(span[0], span[0] + len(indices)) if utils and info.pictures else indices
        times = [(i - origin) / info.fps for i in numbers]
    height, width, pre_size = _frame_size(info, sampling, sampled, len(indices))
    grid = (len(indices) // sampling.temporal_patch_size, height // sampling.patch_size, width // sampling.patch_size)
    return FramePlan(tuple(indices), tuple(times), height, width, grid, sampling.merge_size, pre_size, utils)


def _frame_size(
    info: ClipInfo, sampling: Sampling, sampled: int, shown: int
) -> tuple[int, int, tuple[int, int] | None]:
    """Height and width of the frames shown, and of a first resize by PIL."""
    height, width, factor = info.height, info.width, sampling.factor
    if sampling.dialect == "qwen_vl_utils":
        return _utils_size(info, sampling, shown)
    pre_size = None
    min_pixels, max_pixels = sampling.min_pixels, sampling.max_pixels
    if sampling.dialect == "llamafactory":
        pre_size = height, width = llamafactory_size(height, width, min_pixels, max_pixels)
        min_pixels, max_pixels = sampling.processor_min_pixels, sampling.processor_max_pixels
        sampled = shown  # here the odd frame is repeated before the size is chosen, elsewhere after
    if min(height, width) < factor:
        raise SamplingError(f"frames are {width} x {height}; Qwen3-VL needs at least {factor} on each side")
    size = smart_resize(height, width, factor, min_pixels, max_pixels, sampled, sampling.temporal_patch_size)
    return *size, pre_size


def _utils_size(info: ClipInfo, sampling: Sampling, shown: int) -> tuple[int, int, tuple[int, int] | None]:
    height, width, token = info.height, info.width, sampling.factor**2
    fixed = None if sampling.resized_height is None else (sampling.resized_height, sampling.resized_width)
    image_bounds = [tokens * token for tokens in _UTILS_IMAGE_TOKENS]
    pre_size = None
    if info.pictures:
        # Pictures pass through its image loader first, which is told a patch twice as large as the real one.
        least, most = (4 * pixels for pixels in image_bounds)
        if fixed is None:
            least, most = sampling.min_pixels or least, sampling.max_pixels or most
        pre_size = height, width = utils_smart_resize(*(fixed or (height, width)), 2 * sampling.factor, least, most)
    if fixed is not None:
        return *utils_smart_resize(*fixed, sampling.factor, *image_bounds), pre_size
    least, limit = utils_frame_bounds(sampling, shown)
    size = utils_smart_resize(height, width, sampling.factor, least, min(sampling.max_pixels or limit, limit))
    return *size, pre_size


# The ways in which `shrink` makes a clip smaller, in this order.
SHRINK_STAGES = 4


def shrink(sampling: Sampling, plan: FramePlan, stage: int, share: float) -> dict[str, int | None]:
    """Settings with which a clip takes fewer tokens.

    First it loses pixels, down to min_pixels; then frames, down to min_frames; then, below what the recipe asks for,
    pixels down to one token for each pair of frames, and frames down to two. A stage begins where the one before ended.

    Args:
        sampling: the clip's.
        plan: what would be shown of it.
        stage: 0 to SHRINK_STAGES - 1.
        share: of the way that is not gone in this stage, 0 to 1.

    Returns:
        Settings of the clip in place of the recipe's; None takes one away.
    """
    clip_wide = sampling.dialect == "qwen_finetune"
    height, width = plan.pre_size if sampling.dialect == "llamafactory" else (plan.height, plan.width)
    frames = len(plan.indices)
    least_frames = min(2 if sampling.nframes else sampling.min_frames, frames)
    pixels = shown_pixels = height * width * (frames if clip_wide else 1)
    token_pixels = sampling.factor**2 * (least_frames if clip_wide else 1)
    if not clip_wide:  # the other dialects round the shorter side down, and need a token of it
        token_pixels *= 2 + 2 * max(height, width) // min(height, width)
    token_pixels = min(token_pixels, pixels)
    least_pixels = sampling.min_pixels or _UTILS_FRAME_TOKENS[0] * sampling.factor**2
    least_pixels = min(max(least_pixels, token_pixels), pixels)
    if stage == 0:
        pixels = round(least_pixels + share * (pixels - least_pixels))
    elif stage == 1:
        pixels, frames = least_pixels, round(least_frames + share * (frames - least_frames))
    elif stage == 2:
        pixels, frames = round(token_pixels + share * (least_pixels - token_pixels)), least_frames
    else:
        pixels, frames = token_pixels, max(2, round(2 + share * (least_frames - 2)))
    settings: dict[str, int | None] = {}
    # qwen-vl-utils shares total_pixels among the frames: fewer of them would each grow.
    if pixels < shown_pixels or (sampling.dialect == "qwen_vl_utils" and frames < len(plan.indices)):
        settings["max_pixels"] = pixels
        if sampling.min_pixels is None or sampling.min_pixels > pixels:
            settings["min_pixels"] = min(pixels, least_pixels)
    if sampling.resized_height is not None:
        settings |= {"resized_height": None, "resized_width": None}
    if sampling.nframes is not None:
        settings["nframes"] = frames // 2 * 2
    elif stage:
        settings["max_frames"] = frames
        if sampling.min_frames > frames:
            settings["min_frames"] = frames
    return settings


@functools.lru_cache
def most_tokens(sampling: Sampling, pictures: int | None = None) -> int:
    """Tokens that no clip takes more of, whatever it holds: visual ones, and those of the times beside them.

    Args:
        pictures: for a list of pictures: how many.
    """
    most = sampling.nframes or sampling.max_frames
    if pictures is not None and sampling.dialect == "qwen_vl_utils":
        most = pictures
    return max(_most_tokens(sampling, frames) for frames in range(1, most + 1 + most % 2))


def _most_tokens(sampling: Sampling, frames: int) -> int:
    token = sampling.factor**2
    if sampling.dialect == "qwen_finetune":
        area = sampling.max_pixels / frames
    elif sampling.dialect == "llamafactory":
        area = max(sampling.max_pixels, 200 * _LLAMAFACTORY_MIN_SIDE**2, sampling.processor_min_pixels / 2)
    elif sampling.resized_height is not None:
        area = _UTILS_IMAGE_TOKENS[1] * token
    else:
        area = max(utils_frame_bounds(sampling, frames))
    # Sides are rounded up to whole tokens; with sides of 200 : 1 that adds the most.
    area += sampling.factor * math.sqrt(area) * (math.sqrt(200) + math.sqrt(1 / 200)) + token
    return math.ceil((frames + frames % 2) / 2 * (area / token + _TIME_TOKENS))
