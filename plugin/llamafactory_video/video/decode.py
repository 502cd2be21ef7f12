"""The planned frames of a clip, decoded and resized: uint8, nothing else.

A file is decoded from a key frame on, and only as far as wanted frames need it. Packets whose frame is not wanted and
that no other frame refers to are left out: in usual H.264 and H.265 files that is up to half of them.
"""

import functools
import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import BinaryIO, TypeVar

import av
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as float_transforms
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from .probe import (
    ClipError,
    Orientation,
    Packets,
    VideoFile,
    describe,
    known_packets,
    open_container,
    packets_of,
    video_stream,
)
from .sampling import FramePlan

Result = TypeVar("Result")

# Passing over this many packets by reading them costs about as much as a seek.
_SEEK_GAP = 100


class DisagreementError(Exception):
    """What a file yields is not what its packets promised."""


class SeekError(Exception):
    """A file's index does not lead to its key frames."""


def resize_frame(frame: np.ndarray, plan: FramePlan) -> np.ndarray:
    """One frame at its planned size, by the resizing of transformers' video processor or of qwen-vl-utils.

    Args:
        frame: (H, W, 3) uint8.

    Returns:
        (plan.height, plan.width, 3) uint8.
    """
    if plan.pre_size is not None and plan.pre_size != frame.shape[:2]:
        frame = np.asarray(Image.fromarray(frame).resize(plan.pre_size[::-1]))
    if frame.shape[:2] == (plan.height, plan.width):
        return frame
    planes = torch.from_numpy(np.require(frame, requirements="CW")).permute(2, 0, 1)
    resize = float_transforms.resize if plan.float_resize else transforms.resize
    planes = resize(planes, [plan.height, plan.width], InterpolationMode.BICUBIC, antialias=True)
    return planes.permute(1, 2, 0).numpy()


def decode_frames(
    source: str | BinaryIO, file: VideoFile, plan: FramePlan, threads: int = 1, timeout: float | None = None
) -> np.ndarray:
    """The planned frames of a video file, (T, plan.height, plan.width, 3) uint8.

    Only wanted frames are converted to RGB, and each is resized at once, so memory holds the planned size alone.

    Args:
        file: what `probe` or `count_by_decoding` found, from which the plan was made.
        threads: that decode.
        timeout: seconds that it may take altogether.

    Raises:
        DisagreementError: if the file yields other frames than its packets promised.
        ClipError: if it takes too long, or cannot be opened.
    """
    shown = np.empty((len(plan.indices), plan.height, plan.width, 3), np.uint8)
    places: dict[int, list[int]] = {}
    for place, index in enumerate(plan.indices):
        places.setdefault(index, []).append(place)
    tick = _deadline(timeout)

    def read(find: Callable[..., Iterator[tuple[int, av.VideoFrame]]], threads: int) -> None:
        with open_container(source, timeout) as container:
            stream = video_stream(container)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = threads
            if not file.counted:  # what stands in for a damaged part depends on the frames that are left out
                stream.codec_context.options |= {"err_detect": "explode"}
            for index, frame in find(container, stream, tick):
                if index in places:
                    if not file.counted or index == 0:
                        _check_frame(frame, file)
                    picture = file.orientation.apply(frame.to_ndarray(format="rgb24"))
                    shown[places.pop(index)] = resize_frame(picture, plan)
                    if not places:
                        return

    try:
        if file.counted:  # damaged pictures come out alike only in one thread
            read(functools.partial(_by_order, tolerant=True), 1)
        else:
            packets = known_packets(source, file.stamp)
            if packets is None:
                with open_container(source, timeout, packets_only=True) as container:
                    packets = packets_of(source, file.stamp, container, video_stream(container))
            if packets.num_frames != file.info.num_frames:
                raise DisagreementError("has other packets than when it was probed")
            if packets.in_order:
                read(functools.partial(_by_order, tolerant=False), threads)
            else:
                wanted = sorted(places)
                shares = _shares(_runs(packets, packets.position[wanted]), threads if isinstance(source, str) else 1)
                find = functools.partial(_by_time, packets=packets, wanted=wanted)

                def read_share(runs: list[tuple[int, int]]) -> None:
                    try:
                        read(functools.partial(find, runs=runs), threads // len(shares))
                    except SeekError:
                        read(functools.partial(find, runs=runs, seeks=False), threads // len(shares))

                # Groups of pictures are decoded side by side: a decoder's own threads wait for one another.
                others = [start(functools.partial(read_share, share)) for share in shares[1:]]
                read_share(shares[0])
                for wait in others:
                    wait(None)
    except av.FFmpegError as error:
        raise DisagreementError(f"cannot be decoded ({error.strerror})") from error
    if places:
        raise DisagreementError(f"frame {min(places)} is missing")
    return shown


def start(work: Callable[[], Result]) -> Callable[[float | None], Result]:
    """Begin a piece of work in a thread that the process need not wait for when it ends.

    Returns:
        A function that waits for its result at most so many seconds, and raises what the work raised, or TimeoutError.
    """
    done: queue.SimpleQueue = queue.SimpleQueue()
    try:
        jobs = _idle.pop()
    except IndexError:
        jobs = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(jobs,), daemon=True, name="read clips").start()
    jobs.put((work, done))

    def wait(timeout: float | None) -> Result:
        try:
            result, error = done.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        return result

    return wait


# Jobs of threads that have nothing to do. A new thread for each clip would leave OpenMP's own behind, which torch makes.
_idle: list[queue.SimpleQueue] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)


def _serve(jobs: queue.SimpleQueue) -> None:
    while True:
        work, done = jobs.get()
        try:
            outcome = work(), None
        except BaseException as error:
            outcome = None, error
        _idle.append(jobs)
        done.put(outcome)
        del work, done, outcome  # frames are not held until the next job


def _shares(runs: list[tuple[int, int]], count: int) -> list[list[tuple[int, int]]]:
    """The runs in at most `count` shares of about the same number of packets."""
    total = sum(end - begin for begin, end in runs)
    shares: list[list[tuple[int, int]]] = [[]]
    filled = 0
    for begin, end in runs:
        if shares[-1] and len(shares) < count and filled + (end - begin) / 2 > total * len(shares) / count:
            shares.append([])
        shares[-1].append((begin, end))
        filled += end - begin
    return shares


def count_by_decoding(source: str | BinaryIO, file: VideoFile, timeout: float | None = None) -> VideoFile:
    """Decode a whole file, past its errors, and describe what came out.

    Raises:
        ClipError: if nothing did.
    """
    seconds: list[float] = []
    first = None
    try:
        with open_container(source, timeout) as container:
            stream = video_stream(container)
            stream.codec_context.thread_count = 1
            for index, frame in _by_order(container, stream, _deadline(timeout), tolerant=True):
                if first is None:
                    first = frame
                stamp = frame.pts if frame.pts is not None else frame.dts
                rate = float(stream.average_rate or stream.guessed_rate or 1)
                seconds.append(index / rate if stamp is None else float(stamp * frame.time_base))
            if first is None:
                raise ClipError("no frame of it can be decoded; the file is damaged")
            orientation, size = _orientation(first), (first.height, first.width)
            info = describe(stream, np.maximum.accumulate(np.array(seconds)), orientation, size)
    except av.FFmpegError as error:
        raise ClipError(f"cannot be decoded ({error.strerror})") from error
    lost = file.info.num_frames - info.num_frames
    note = file.note
    if lost > 0:
        note = f"damaged: {info.num_frames} of {file.info.num_frames} frames can be decoded, {lost} are lost"
    return replace(
        file,
        info=info,
        height=size[0],
        width=size[1],
        orientation=orientation,
        counted=True,
        note=note,
    )


def _deadline(timeout: float | None) -> Callable[[], None]:
    """A function that raises once `timeout` seconds have passed."""
    end = None if timeout is None else time.monotonic() + timeout

    def tick() -> None:
        if end is not None and time.monotonic() > end:
            raise ClipError(f"decoding took more than video_timeout, {timeout:g} s")

    return tick


def _orientation(frame: av.VideoFrame) -> Orientation:
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return Orientation() if matrix is None else Orientation.of_matrix(struct.unpack("<9i", bytes(matrix)))


def _check_frame(frame: av.VideoFrame, file: VideoFile) -> None:
    if (frame.height, frame.width) != (file.height, file.width):
        raise DisagreementError(f"frames are {frame.width} x {frame.height}, not {file.width} x {file.height}")
    if _orientation(frame) != file.orientation:
        raise DisagreementError("frames are turned otherwise than the track says")


def _by_order(
    container: av.container.InputContainer, stream: av.VideoStream, tick: Callable[[], None], tolerant: bool
) -> Iterator[tuple[int, av.VideoFrame]]:
    """All frames with their number in the order in which they come out.

    Args:
        tolerant: pass over what cannot be decoded and frames that came out damaged.
    """
    number = 0
    demuxer = container.demux(stream)
    while True:
        tick()
        try:
            packet = next(demuxer)
            frames = stream.decode(packet)
        except StopIteration:
            return
        except av.FFmpegError:
            if not tolerant:
                raise
            frames = []
        for frame in frames:
            if frame.is_corrupt:
                if tolerant:
                    continue
                raise DisagreementError(f"frame {number} is damaged")
            yield number, frame
            number += 1


def _by_time(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    tick: Callable[[], None],
    packets: Packets,
    wanted: list[int],
    runs: list[tuple[int, int]],
    seeks: bool = True,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The wanted frames of some runs with their numbers in order of presentation, told apart by their time stamps.

    Args:
        wanted: frame numbers.
        runs: of packets, in their order.
        seeks: otherwise what lies between runs is read, and not decoded.

    Raises:
        SeekError: if a key frame cannot be found by seeking.
    """
    numbers = dict(zip(packets.pts[packets.position[wanted]].tolist(), wanted, strict=True))
    refers = _reference_test(stream)
    demuxer, position = container.demux(stream), 0  # position: of the next packet
    for begin, end in runs:
        if position != begin:
            if position:
                yield from _named(stream.decode(None), numbers)
                stream.codec_context.flush_buffers()
            if seeks and begin - position >= _SEEK_GAP:
                demuxer, packet, position = _seek(container, stream, packets, begin)
                if position == begin:
                    yield from _named(stream.decode(packet), numbers)
                position += 1
        while position < end:
            tick()
            packet = next(demuxer)
            if not packet.size:
                if packet.dts is None:
                    raise DisagreementError("it ends before its last wanted frame")
                continue
            if position >= begin and (packet.pts in numbers or refers(packet)):
                yield from _named(stream.decode(packet), numbers)
            position += 1
    yield from _named(stream.decode(None), numbers)


def _seek(
    container: av.container.InputContainer, stream: av.VideoStream, packets: Packets, begin: int
) -> tuple[Iterator[av.Packet], av.Packet, int]:
    """Seek to a key frame, or before it: not every container has an index that leads to it exactly.

    Returns:
        The packets from there on, the first of them, and its position.
    """
    keys = np.flatnonzero(packets.keys[: begin + 1])
    for back in (1, 2, 4):
        target = int(keys[-back]) if back <= len(keys) else 0
        container.seek(int(packets.pts[target]), stream=stream)
        demuxer = container.demux(stream)
        packet = next(demuxer)
        found = np.flatnonzero(packets.pts == packet.pts) if packet.size and packet.pts is not None else ()
        if len(found) == 1 and found[0] <= begin:
            return demuxer, packet, int(found[0])
    raise SeekError


def _runs(packets: Packets, positions: np.ndarray) -> list[tuple[int, int]]:
    """Stretches of packets, first and one past the last, that must be gone through for the packets at `positions`.

    Each begins with the last key frame before a wanted one, in decoding order and in time: pictures that come after
    a key frame in the file and before it in time may refer to what lies before.
    """
    keys = np.flatnonzero(packets.keys)
    runs: list[tuple[int, int]] = []
    for position in sorted(positions.tolist()):
        before = keys[: np.searchsorted(keys, position, side="right")]
        usable = before[packets.pts[before] <= packets.pts[position]]
        begin = int(usable[-1]) if len(usable) else 0
        while runs and begin < runs[-1][1]:
            begin = min(begin, runs.pop()[0])
        runs.append((begin, position + 1))
    return runs


def _named(frames: list[av.VideoFrame], numbers: dict[int, int]) -> Iterator[tuple[int, av.VideoFrame]]:
    for frame in frames:
        if frame.pts in numbers:
            if frame.is_corrupt:
                raise DisagreementError(f"frame {numbers[frame.pts]} is damaged")
            yield numbers[frame.pts], frame


def _reference_test(stream: av.VideoStream) -> Callable[[av.Packet], bool]:
    """Whether other frames may refer to a packet's frame; True wherever its first bytes do not rule it out.

    Read are nal_ref_idc (ITU-T H.264, 7.4.1), sub-layer non-reference types of the highest sub-layer (H.265, 7.4.2.2)
    and B pictures of MPEG-4 part 2 and MPEG-2.
    """
    codec, extra = stream.codec_context.name, stream.codec_context.extradata or b""
    packed = extra[:1] == b"\1"  # MP4 and Matroska put a unit's length before it, others a start code
    if codec == "h264":
        length = (extra[4] & 3) + 1 if packed and len(extra) > 4 else 0

        def refers(unit: bytes) -> bool | None:
            kind = unit[0] & 31
            return bool(unit[0] >> 5 & 3) if 1 <= kind <= 5 else (True if kind in (7, 8, 13, 15) else None)
    elif codec == "hevc" and packed and len(extra) > 21:
        length, layers = (extra[21] & 3) + 1, extra[21] >> 3 & 7

        def refers(unit: bytes) -> bool | None:
            kind, layer = unit[0] >> 1 & 63, (unit[1] & 7) - 1
            if kind < 32:
                return not (kind < 16 and kind % 2 == 0 and layer == layers - 1)
            return True if kind <= 34 else None
    elif codec == "mpeg4":
        length = 0

        def refers(unit: bytes) -> bool | None:
            return unit[1] >> 6 != 2 if unit[0] == 0xB6 else None
    elif codec == "mpeg2video":
        length = 0

        def refers(unit: bytes) -> bool | None:
            return unit[2] >> 3 & 7 != 3 if unit[0] == 0 else None
    else:
        return lambda packet: True

    def any_refers(packet: av.Packet) -> bool:
        found = [said for unit in _units(bytes(packet), length) if (said := refers(unit)) is not None]
        return any(found) or not found or (codec == "mpeg4" and len(found) > 1)  # some AVIs pack two into one

    return any_refers


def _units(data: bytes, length: int) -> Iterator[bytes]:
    """The first bytes of each unit of a packet.

    Args:
        length: bytes of the length that stands before each unit; 0: a start code 00 00 01 does.
    """
    at = 0
    while True:
        if length:
            unit = at + length
            at = unit + int.from_bytes(data[at:unit])
        else:
            unit = data.find(b"\0\0\1", at) + 3
            at = unit
            if unit < 3:
                return
        if unit + 3 > len(data):
            return
        yield data[unit : unit + 3]
