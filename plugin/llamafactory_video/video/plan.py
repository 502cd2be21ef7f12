"""What of a clip is shown: arithmetic on a clip's length, rate and size, with no file opened.

`plan_frames` turns a `ClipInfo` (what the file holds) and a `Sampling` (what was asked for) into a `FramePlan`
(which frames, at which times, at which size). Tokenising, collating, chat and evaluation all ask this one
function, so what the model is told can never differ from what it is shown.
"""

import bisect
import math
from dataclasses import replace

from .sampling import ClipInfo, FramePlan, Sampling, SamplingError, mean_rate
from .sizes import frame_size

_RARE = 10  # times the mean distance of two frames


def select_span(info: ClipInfo, sampling: Sampling, start: float | None, end: float | None) -> range:
    """The frame numbers between two times, in seconds; None leaves that side open.

    In `qwen_vl_utils` as there: start <= time <= end, and more than one frame. Else start <= time < end; where no frame
    begins for a while after `start`, the one that is on the screen then comes first.

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
        if start is not None and first > 0 and start < info.duration:
            # A frame is on the screen until the next one.
            rare = bool(info.times) and first <= last and info.time(first) - start > 1 / sampling.fps
            first -= rare or first > last
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
        import torch  # here: it takes seconds, and the rounding of its float32 has no other source

        return torch.linspace(first, first + n - 1, count).round().long().tolist()
    # Spread from 0, as over a file that was cut out: halves round to the even number. This is numpy.linspace to the
    # bit, without the time that it takes over short lists.
    step = (n - 1) / (count - 1) if count > 1 else 0.0
    spread = [i * step for i in range(count - 1)] + [float(n - 1) if count > 1 else 0.0]
    to_number = int if sampling.dialect == "llamafactory" else round
    return [first + to_number(number) for number in spread]


def _sample_times(
    times: tuple[float, ...], span: range, positions: list[int], begin: float
) -> tuple[list[int], list[float]]:
    """The frames shown where `positions` would lie if all frames of the span were equally long, and when.

    These are the nearest, at their own times. Where frames are rare (`_RARE`), and several of those places lie between two,
    it is the one on the screen, at that place's time.

    Args:
        begin: time at which the span begins; its first frame may have come before.
    """
    length = times[span[-1]] - begin
    rare = max(2 * length / max(len(positions) - 1, 1), _RARE * length / (len(span) - 1))
    frames, shown = [], []
    for position in positions:
        wanted = begin + length * (position - span[0]) / (len(span) - 1)
        after = bisect.bisect_left(times, wanted, span.start, span.stop - 1)
        before = max(after - 1, span[0])
        if times[after] - max(times[before], begin) > rare and wanted < times[after]:
            frames.append(before)
            shown.append(wanted)
        else:
            nearest = before if wanted - times[before] <= times[after] - wanted else after
            frames.append(nearest)
            shown.append(max(times[nearest], begin))
    return frames, shown


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
    begin = info.time(span[0]) if utils or start is None else max(info.time(span[0]), start)
    shown: list[float] = []
    if utils and info.pictures:
        indices = list(span)  # a list of pictures counts as sampled already
    elif info.times and n > 1 and info.times[span[-1]] > begin:
        fps = mean_rate(n, info.times[span[-1]] - begin)
        count = count_frames(n, fps, n / fps, sampling)
        positions = sample_positions(n, count, sampling, span[0])
        indices, shown = _sample_times(info.times, span, positions, begin)
    else:
        duration = info.duration if n == info.num_frames else n / info.fps
        count = count_frames(n, info.fps, duration, sampling)
        indices = sample_positions(n, count, sampling, span[0])
    sampled = len(indices)
    indices += indices[-1:] * (-sampled % sampling.temporal_patch_size)
    if info.times:
        shown = shown or [max(info.times[i], begin) for i in indices]
        shown += shown[-1:] * (len(indices) - len(shown))
        origin = info.times[0] if utils else begin
        times = [time - origin for time in shown]
    else:
        origin = 0 if utils else span[0]
        # qwen-vl-utils repeats the last of an odd number of pictures under the next number, not under its own.
        numbers = range(span[0], span[0] + len(indices)) if utils and info.pictures else indices
        times = [(i - origin) / info.fps for i in numbers]
    height, width, pre_size = frame_size(info, sampling, sampled, len(indices))
    grid = (len(indices) // sampling.temporal_patch_size, height // sampling.patch_size, width // sampling.patch_size)
    return FramePlan(tuple(indices), tuple(times), height, width, grid, sampling.merge_size, pre_size, utils)
