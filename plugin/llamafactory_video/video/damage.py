"""Files that are damaged, or whose packets tell their frames wrong: decoded whole, past errors, once."""

import bisect
from collections.abc import Sequence
from dataclasses import replace
from typing import BinaryIO

import av
import numpy as np
from av.video.frame import PictureType

from .decode import STRICT_OPTIONS, all_packets, decode_packets
from .orientation import orientation_of
from .probe import ClipError, VideoFile, continued, describe, open_container, video_stream
from .threads import deadline


def count_by_decoding(source: str | BinaryIO, file: VideoFile, timeout: float | None = None) -> VideoFile:
    """Decode a whole file, past its errors, and describe the frames that came out whole.

    Raises:
        ClipError: if none did.
    """
    out: list[tuple[int, bool]] = []
    sent: list[tuple[int | None, int | None, bool]] = []  # time stamps of presentation and of decoding of the packets
    damaged: set[int] = set()
    first = None
    try:
        with open_container(source, timeout) as container:
            stream = video_stream(container)
            stream.codec_context.thread_count = 1
            stream.codec_context.options |= STRICT_OPTIONS
            packets = all_packets(container, stream)
            for _, packet, frames, failed in decode_packets(stream, packets, deadline(timeout), believes_flags=True):
                if packet is not None and packet.size:
                    sent.append((packet.pts, packet.dts, packet.is_keyframe))
                if failed:
                    damaged.add(len(sent) - 1)
                for frame in frames:
                    if frame.opaque is None:  # H.264's stand-in for one that is missing
                        continue
                    (position,) = frame.opaque
                    if frame.is_corrupt:
                        damaged.add(position)
                        continue
                    first = first or frame
                    out.append((position, frame.key_frame and frame.pict_type == PictureType.I))
            positions = [position for position, _ in out]
            pts, dts, keys = (list(values) for values in zip(*sent, strict=True)) if sent else ([], [], [])
            rate = stream.average_rate or stream.guessed_rate or 1
            pts, _ = continued(pts, dts, keys, round(1 / float(rate * stream.time_base)))
            # AVI has no times of presentation; FFmpeg makes them up.
            by_dts = container.format.name == "avi" and positions == sorted(positions)
            stamps = [dts[p] if by_dts or pts[p] is None else pts[p] for p in positions]
            if None in stamps:
                seconds = [position / float(rate) for position in positions]
            else:
                seconds = [float(stamp * stream.time_base) for stamp in stamps]
            chosen = whole_frames(out, sorted(damaged), pts)
            chosen = [chosen[i] for i in _increasing([seconds[i] for i in chosen])]
            if not chosen:
                raise ClipError("no frame of it can be decoded; the file is damaged")
            orientation, size = orientation_of(first, file.orientation), (first.height, first.width)
            info = describe(stream, np.array([seconds[i] for i in chosen]), orientation, size)
            total = max(len(sent), stream.frames if "mp4" in container.format.name else 0, file.info.num_frames)
    except av.FFmpegError as error:
        raise ClipError(f"cannot be decoded ({error.strerror})") from error
    note, lost = file.note, total - len(chosen)
    if damaged or len(chosen) < file.info.num_frames:
        note = f"damaged: {len(chosen)} of {total} frames can be shown; {lost} are damaged, or are decoded from damaged ones"
    return replace(
        file,
        info=info,
        height=size[0],
        width=size[1],
        orientation=orientation,
        positions=tuple(positions[i] for i in chosen),
        note=note,
    )


def whole_frames(
    frames: Sequence[tuple[int, bool]], damaged: Sequence[int], stamps: Sequence[int | None]
) -> list[int]:
    """Which frames are what their file meant to show: nothing is damaged between each and the key frame before it.

    Args:
        frames: the position of each one's packet in decoding order, and whether decoding can begin with it.
        damaged: positions of packets that are damaged, or before which some are missing, sorted.
        stamps: presentation time stamps of all packets, or None.

    Returns:
        Numbers of the whole ones in `frames`, sorted.
    """

    def leads(position: int, key: int) -> bool:
        """Whether it comes after a key frame in the file and before it on the screen; then it refers to both sides."""
        return key >= 0 and None not in (stamps[position], stamps[key]) and stamps[position] < stamps[key]

    broken = set(damaged)
    keys = [-1, *sorted(position for position, is_key in frames if is_key and position not in broken)]
    # Of each key frame and what follows it up to the next: the first that is damaged, and the first of those that others
    # may refer to; frames on the screen before their key frame are no one's reference after it.
    first = [(len(stamps), len(stamps))] * len(keys)
    for position in reversed(damaged):
        at = bisect.bisect_right(keys, position) - 1
        first[at] = position, first[at][1] if leads(position, keys[at]) else position
    whole = []
    for number, (position, _) in enumerate(frames):
        at = bisect.bisect_right(keys, position) - 1
        if leads(position, keys[at]):
            is_whole = first[at - 1][0] == len(stamps) and position < first[at][0]
        else:
            is_whole = position < first[at][1]
        if is_whole:
            whole.append(number)
    return whole


def _increasing(seconds: Sequence[float]) -> list[int]:
    """Numbers of the most times that increase one after the other; damaged time stamps stand out of line."""
    ends: list[float] = []  # the least last time of a chain of each length, and the number that has it
    numbers: list[int] = []
    previous: list[int] = []
    for number, second in enumerate(seconds):
        at = bisect.bisect_left(ends, second)
        previous.append(numbers[at - 1] if at else -1)
        ends[at:], numbers[at:] = [second, *ends[at + 1 :]], [number, *numbers[at + 1 :]]
    chain, number = [], numbers[-1] if numbers else -1
    while number >= 0:
        chain.append(number)
        number = previous[number]
    return chain[::-1]
