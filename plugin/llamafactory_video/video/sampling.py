"""What a clip holds (`ClipInfo`), what is asked for (`Sampling`), what of it is shown (`FramePlan`).

Three dialects give a sampling's numbers their meaning: `qwen_finetune` (transformers' Qwen3VLVideoProcessor, which the
official trainer uses), `qwen_vl_utils` (the package of that name, 0.0.14) and `llamafactory` (LLaMA-Factory 0.9.5).
"""

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import xxhash

DIALECTS = ("llamafactory", "qwen_finetune", "qwen_vl_utils")
_UTILS_ONLY = ("total_pixels", "nframes", "resized_height", "resized_width")


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
                raise SamplingError(f"{name} works only with video_sampling: qwen_vl_utils, not {self.dialect}")
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
    def digest(self) -> str:
        """A few letters that tell it from other plans."""
        return xxhash.xxh3_64_hexdigest(repr(self).encode())

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
