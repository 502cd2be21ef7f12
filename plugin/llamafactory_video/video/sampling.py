"""What of a clip is shown: arithmetic on a clip's length, rate and size, with no file opened.

`plan_frames` turns a `ClipInfo` (what the file holds) and a `Sampling` (what was asked for) into a `FramePlan`
(which frames, at which times, at which size). Tokenising, collating, chat and evaluation all ask this one
function, so what the model is told can never differ from what it is shown.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# LLaMA-Factory pre-shrinks frames with PIL before the processor's own resize, never below this side (pixels).
_LLAMAFACTORY_MIN_SIDE = 28


class SamplingError(ValueError):
    """A clip, or a setting, from which no frames can be planned."""


@dataclass(frozen=True)
class ClipInfo:
    """What a clip holds, as counted from its packets.

    Attributes:
        num_frames: frames that the clip yields when decoded.
        fps: average frame rate, in frames per second.
        duration: in seconds.
        height, width: frame size in pixels, as shown.
        times: presentation time of every frame in seconds, from the first one; empty means index / fps.
    """

    num_frames: int
    fps: float
    duration: float
    height: int
    width: int
    times: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How frames are asked for.

    Attributes:
        dialect: whose meaning the numbers have: `qwen_finetune` (transformers' Qwen3VLVideoProcessor, used by the
            official trainer: pixel numbers count the whole clip, frames x height x width) or `llamafactory`
            (pixel numbers count one frame, before the processor's own clip-wide limits).
        fps: frames to sample per second.
        min_frames, max_frames: bounds on the number of frames.
        min_pixels, max_pixels: bounds in the dialect's meaning.
        processor_min_pixels, processor_max_pixels: the processor's own clip-wide bounds (`llamafactory` only).
        image_bounds: least and greatest pixels of an image before the processor's own bounds (`llamafactory` only).
        patch_size, temporal_patch_size, merge_size: of the vision tower.
    """

    dialect: str = "qwen_finetune"
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 4096
    max_pixels: int = 25165824
    processor_min_pixels: int = 4096
    processor_max_pixels: int = 25165824
    image_bounds: tuple[int, int] | None = None
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2

    def __post_init__(self) -> None:
        if self.fps <= 0:
            raise SamplingError(f"video_fps is {self.fps}; it must be above 0")
        if not 1 <= self.min_frames <= self.max_frames:
            raise SamplingError(
                f"video_min_frames is {self.min_frames} and video_max_frames {self.max_frames}; "
                "needed: 1 <= video_min_frames <= video_max_frames"
            )
        if not 0 < self.min_pixels <= self.max_pixels:
            raise SamplingError(
                f"video_min_pixels is {self.min_pixels} and video_max_pixels {self.max_pixels}; "
                "needed: 0 < video_min_pixels <= video_max_pixels"
            )

    def override(self, **settings: Any) -> "Sampling":
        """The same with those of the named settings that are not None."""
        given = {key: value for key, value in settings.items() if value is not None}
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
    """

    indices: tuple[int, ...]
    times: tuple[float, ...]
    height: int
    width: int
    grid: tuple[int, int, int]
    merge_size: int = 2
    pre_size: tuple[int, int] | None = None

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
    if max(height, width) > 200 * min(height, width):
        raise SamplingError(f"frames are {width} x {height}; one side may be at most 200 times the other")
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


def sample_indices(info: ClipInfo, sampling: Sampling) -> list[int]:
    """Frame numbers that the dialect chooses, in order, before an odd count is evened out, (k,)."""
    n = info.num_frames
    if sampling.dialect == "qwen_finetune":
        wanted = max(int(n / info.fps * sampling.fps), sampling.min_frames)
        return np.linspace(0, n - 1, min(wanted, sampling.max_frames, n)).round().astype(int).tolist()
    wanted = max(sampling.min_frames, math.floor(info.duration * sampling.fps))
    return np.linspace(0, n - 1, min(wanted, sampling.max_frames, n)).astype(np.int32).tolist()


def plan_frames(info: ClipInfo, sampling: Sampling) -> FramePlan:
    """Plan what is shown of a clip.

    Raises:
        SamplingError: if the clip has no frames, or a size that the vision tower cannot take.
    """
    if info.num_frames < 1:
        raise SamplingError("no video frames")
    indices = sample_indices(info, sampling)
    num_sampled = len(indices)
    indices += indices[-1:] * (-num_sampled % sampling.temporal_patch_size)
    times = tuple(info.times[i] for i in indices) if info.times else tuple(i / info.fps for i in indices)
    factor = sampling.patch_size * sampling.merge_size
    height, width = info.height, info.width
    pre_size = None
    min_pixels, max_pixels = sampling.min_pixels, sampling.max_pixels
    if sampling.dialect == "llamafactory":
        pre_size = llamafactory_size(height, width, min_pixels, max_pixels)
        height, width = pre_size
        min_pixels, max_pixels = sampling.processor_min_pixels, sampling.processor_max_pixels
        num_sampled = len(indices)  # here the odd frame is repeated before the size is chosen, elsewhere after
    if min(height, width) < factor:
        raise SamplingError(f"frames are {width} x {height}; Qwen3-VL needs at least {factor} on each side")
    height, width = smart_resize(
        height, width, factor, min_pixels, max_pixels, num_sampled, sampling.temporal_patch_size
    )
    grid = (len(indices) // sampling.temporal_patch_size, height // sampling.patch_size, width // sampling.patch_size)
    return FramePlan(tuple(indices), times, height, width, grid, sampling.merge_size, pre_size)


def select_span(times: Sequence[float], start: float | None, end: float | None) -> range:
    """Frame numbers whose time lies in [start, end), in seconds; None leaves that side open."""
    chosen = [i for i, time in enumerate(times) if (start is None or time >= start) and (end is None or time < end)]
    if not chosen:
        last = f"{times[-1]:.2f}" if times else "0"
        raise SamplingError(f"no frame lies between start and end; the last one is at {last} s")
    return range(chosen[0], chosen[-1] + 1)
