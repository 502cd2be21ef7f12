"""The planned frames of a clip, decoded and resized: uint8, nothing else.

A file is decoded from a key frame on, and only as far as wanted frames need it. Packets whose frame is not wanted and
that no other frame refers to are left out: in usual H.264 and H.265 files that is up to half of them.
"""

import bisect
import functools
import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO, TypeVar

import av
import numpy as np
import torch
from av.codec.context import Flags
from av.video.frame import PictureType
from PIL import Image
from torchvision.transforms import functional as float_transforms
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from .codecs import FrameNumbers, reference_test
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

# A decoder that says what is damaged, in place of a picture that it made up.
_STRICTLY = {"err_detect": "explode"}
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
    tick = deadline(timeout)

    def read(find: Callable[..., Iterator[tuple[int, av.VideoFrame]]], threads: int) -> None:
        with open_container(source, timeout) as container:
            stream = video_stream(container)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = threads
            stream.codec_context.options |= _STRICTLY
            for index, frame in find(container, stream, tick):
                if index in places:
                    if not file.positions or index == 0:
                        _check_frame(frame, file)
                    picture = file.orientation.apply(frame.to_ndarray(format="rgb24"))
                    shown[places.pop(index)] = resize_frame(picture, plan)
                    if not places:
                        return

    try:
        if file.positions:  # what a decoder says of damage is alike each time only in one thread
            numbers = {position: number for number, position in enumerate(file.positions)}
            read(functools.partial(_by_position, numbers=numbers), 1)
        else:
            packets = known_packets(source, file.stamp)
            if packets is None:
                with open_container(source, timeout, packets_only=True) as container:
                    packets = packets_of(source, file.stamp, container, video_stream(container))
            if packets.num_frames != file.info.num_frames:
                raise DisagreementError("has other packets than when it was probed")
            if packets.torn:
                raise DisagreementError("some of its packets are damaged")
            if packets.in_order:
                read(_by_order, threads)
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
    """Decode a whole file, past its errors, and describe the frames that came out whole.

    Raises:
        ClipError: if none did.
    """
    out: list[tuple[int, bool]] = []
    stamps: list[int | None] = []  # of these frames
    sent: list[tuple[int | None, int | None]] = []  # time stamps of presentation and of decoding of the packets
    damaged: set[int] = set()
    first = None
    try:
        with open_container(source, timeout) as container:
            stream = video_stream(container)
            stream.codec_context.thread_count = 1
            stream.codec_context.options |= _STRICTLY
            for packet, frames, failed in _tolerantly(container, stream, deadline(timeout)):
                if packet is not None and packet.size:
                    sent.append((packet.pts, packet.dts))
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
                    stamps.append(frame.pts if frame.pts is not None else frame.dts)
            positions = [position for position, _ in out]
            if container.format.name == "avi" and positions == sorted(positions):
                # A frame's own are made up, from damaged packets too.
                stamps = [sent[position][1] for position in positions]
            if None in stamps:
                tick = 1 / (stream.average_rate or stream.guessed_rate or 1)
                stamps = positions
            else:
                tick = stream.time_base
            seconds = [float(stamp * tick) for stamp in stamps]
            chosen = whole_frames(out, sorted(damaged), [pts for pts, _ in sent])
            chosen = [chosen[i] for i in _increasing([seconds[i] for i in chosen])]
            if not chosen:
                raise ClipError("no frame of it can be decoded; the file is damaged")
            orientation, size = _orientation(first), (first.height, first.width)
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


def deadline(
    timeout: float | None, message: str = "decoding took more than video_timeout, {:g} s"
) -> Callable[[], None]:
    """A function that raises ClipError with that message once `timeout` seconds have passed."""
    end = None if timeout is None else time.monotonic() + timeout

    def tick() -> None:
        if end is not None and time.monotonic() > end:
            raise ClipError(message.format(timeout))

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
    container: av.container.InputContainer, stream: av.VideoStream, tick: Callable[[], None]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """All frames with their number in the order in which they come out."""
    number = 0
    frame_numbers = FrameNumbers(stream)
    for packet in container.demux(stream):
        tick()
        if frame_numbers.gap(packet):
            raise DisagreementError(f"frames before frame {number} are missing")
        for frame in stream.decode(packet):
            if frame.is_corrupt:
                raise DisagreementError(f"frame {number} is damaged")
            yield number, frame
            number += 1


def _tolerantly(
    container: av.container.InputContainer, stream: av.VideoStream, tick: Callable[[], None]
) -> Iterator[tuple[av.Packet | None, list[av.VideoFrame], bool]]:
    """All packets, past errors, each with the frames that came out, and whether it is damaged.

    A frame's `opaque` is a list of one: the position of its packet. Positions count from 0 in decoding order.
    """
    stream.codec_context.flags |= Flags.copy_opaque
    frame_numbers = FrameNumbers(stream)
    demuxer, position, torn = container.demux(stream), -1, False
    while True:
        tick()
        packet, frames, failed = None, [], False
        try:
            packet = next(demuxer)
            if packet.size:
                position += 1
                packet.opaque = [
                    position
                ]  # a list, because PyAV 16 takes equal numbers for one object, freed with the first
                # A transport stream's gap is told with the frame that was under way, which may be the one before.
                failed = packet.is_corrupt or torn or frame_numbers.gap(packet)
                torn = packet.is_corrupt
            frames = stream.decode(packet)
        except StopIteration:
            return
        except av.FFmpegError:
            failed = True
        yield packet, frames, failed


def _by_position(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    tick: Callable[[], None],
    numbers: dict[int, int],
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames of a damaged file with their numbers; `numbers` has those of the whole ones, by their packet's position."""
    for _, frames, _ in _tolerantly(container, stream, tick):
        for frame in frames:
            number = numbers.get(frame.opaque[0]) if frame.opaque else None
            if number is not None:
                if frame.is_corrupt:
                    raise DisagreementError(f"frame {number} is damaged")
                yield number, frame


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
    refers, frame_numbers = reference_test(stream), FrameNumbers(stream)
    demuxer, position = container.demux(stream), 0  # position: of the next packet
    for begin, end in runs:
        if position != begin:
            if position:
                yield from _named(stream.decode(None), numbers)
                stream.codec_context.flush_buffers()
                frame_numbers.restart()
            if seeks and begin - position >= _SEEK_GAP:
                demuxer, packet, position = _seek(container, stream, packets, begin)
                if position == begin:
                    frame_numbers.gap(packet)
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
                if frame_numbers.gap(packet):
                    raise DisagreementError("frames between those of its packets are missing")
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
