"""The planned frames of a clip, decoded and resized: uint8, nothing else.

A file is decoded from a key frame on, and only as far as wanted frames need it. Packets whose frame is not wanted and
that no other frame refers to are left out: in usual H.264 and H.265 files that is up to half of them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import BinaryIO

import av
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as float_transforms
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from .codecs import FrameNumbers, reference_test
from .damage import STRICT_OPTIONS, decode_past_errors
from .orientation import orientation_of
from .probe import Packets, VideoFile, open_container, scan_packets, video_stream
from .sampling import FramePlan
from .threads import deadline, start

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
    source: str | BinaryIO,
    file: VideoFile,
    plan: FramePlan,
    packets: Packets | None = None,
    threads: int = 1,
    timeout: float | None = None,
) -> np.ndarray:
    """The planned frames of a video file, (T, plan.height, plan.width, 3) uint8.

    Only wanted frames are converted to RGB, and each is resized at once, so memory holds the planned size alone.

    Args:
        file: what `probe` or `count_by_decoding` found, from which the plan was made.
        packets: the file's, if they are at hand; otherwise they are read.
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
            stream.codec_context.options |= STRICT_OPTIONS
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
            packets = packets or scan_packets(source, timeout)
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


def _check_frame(frame: av.VideoFrame, file: VideoFile) -> None:
    if (frame.height, frame.width) != (file.height, file.width):
        raise DisagreementError(f"frames are {frame.width} x {frame.height}, not {file.width} x {file.height}")
    if orientation_of(frame) != file.orientation:
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


def _by_position(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    tick: Callable[[], None],
    numbers: dict[int, int],
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames of a damaged file with their numbers; `numbers` has those of the whole ones, by their packet's position."""
    for _, frames, _ in decode_past_errors(container, stream, tick):
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
