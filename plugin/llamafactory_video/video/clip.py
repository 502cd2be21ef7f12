"""A clip -> its plan, and its planned frames. Training, chat and evaluation have no other way to either."""

import io
import os
from typing import Any

import numpy as np

from ..data.conversation import Clip, decode_clip
from .decode import decode_frames, resize_frame
from .probe import ClipError, open_picture, picture_size, probe
from .sampling import ClipInfo, FramePlan, Sampling, SamplingError, plan_frames


def as_clip(video: Any) -> Clip:
    """A clip from what LLaMA-Factory passes as a video.

    Args:
        video: text from `Clip.encode`, a path, a file object or bytes, or a list of frame pictures.
    """
    if isinstance(video, Clip):
        return video
    if isinstance(video, str):
        return decode_clip(video)
    if isinstance(video, os.PathLike):
        return Clip(path=os.fspath(video))
    if isinstance(video, list | tuple):
        return Clip(frames=tuple(video))
    stream = buffer_stream(video)
    if not hasattr(stream, "seek"):
        raise ClipError(f"a {type(video).__name__} is no video; a path, a file object or frame pictures are needed")
    return Clip(path=stream)


def buffer_stream(video: Any) -> Any:
    """Bytes, or a stream that can be read only once, as a file object that can be read again; the rest as it is."""
    if isinstance(video, bytes):
        return io.BytesIO(video)
    if hasattr(video, "read") and not (hasattr(video, "seekable") and video.seekable()):
        return io.BytesIO(video.read())
    return video


def plan_clip(video: Any, sampling: Sampling) -> FramePlan:
    """What is shown of a clip. Frame numbers count in the whole file, times from the start of the clip.

    Args:
        video: anything that `as_clip` takes.
        sampling: the recipe's; the clip's own settings override it.

    Raises:
        ClipError: naming the clip, if it cannot be read or shown.
    """
    clip = as_clip(video)
    try:
        sampling = sampling.override(
            fps=clip.fps,
            min_frames=clip.min_frames,
            max_frames=clip.max_frames,
            min_pixels=clip.min_pixels,
            max_pixels=clip.max_pixels,
        )
        info = _frames_info(clip, sampling.fps) if clip.frames else probe(clip.path)
        return plan_frames(info, sampling, clip.start, clip.end)
    except (SamplingError, ClipError) as error:
        raise ClipError(f"{clip}: {error}") from error


def read_clip(video: Any, plan: FramePlan) -> np.ndarray:
    """The planned frames, (T, plan.height, plan.width, 3) uint8.

    Raises:
        ClipError: naming the clip, if it cannot be decoded.
    """
    clip = as_clip(video)
    try:
        if not clip.frames:
            return decode_frames(clip.path, plan)
        return np.stack([resize_frame(np.asarray(open_picture(clip.frames[i])), plan) for i in plan.indices])
    except ClipError as error:
        raise ClipError(f"{clip}: {error}") from error


def _frames_info(clip: Clip, default_rate: float) -> ClipInfo:
    sizes = {picture_size(frame) for frame in clip.frames}
    if len(sizes) > 1:
        raise ClipError(f"frames differ in size, {sorted(sizes)} (h, w); they must be alike")
    height, width = sizes.pop()
    count = len(clip.frames)
    if clip.times:
        times = tuple(time - clip.times[0] for time in clip.times)
        # Rounded, for times such as 0.1666…: int(n / 6.0000001 * fps) would be one frame short.
        rate = round((count - 1) / times[-1], 6) if count > 1 else default_rate
        return ClipInfo(count, rate, count / rate, height, width, times, pictures=True)
    # LLaMA-Factory takes a list without a rate to be sampled already, at video_fps.
    rate = clip.frame_rate or default_rate
    return ClipInfo(count, rate, count / rate, height, width, pictures=True)
