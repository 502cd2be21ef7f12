"""The planned frames of a clip, decoded and resized: uint8, nothing else.

A file is decoded from a key frame on, and only as far as wanted frames need it. Packets whose frame is not wanted and
that no other frame refers to are left out: in usual H.264 and H.265 files that is up to half of them.
"""

import functools
from collections.abc import Callable, Container, Iterable, Iterator
from typing import BinaryIO

import av
import numpy as np
import torch
from av.codec.context import Flags
from PIL import Image
from torchvision.transforms import functional as float_transforms
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from .codecs import FrameNumbers, reference_test
from .orientation import orientation_of
from .probe import Packets, VideoFile, open_container, scan_packets, video_stream
from .sampling import FramePlan
from .threads import deadline, start

# A decoder that says what is damaged, in place of a picture that it made up.
STRICT_OPTIONS = {"err_detect": "explode"}
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
    result = np.empty((len(plan.indices), plan.height, plan.width, 3), np.uint8)
    slots: dict[int, list[int]] = {}  # of each wanted frame: where in the result it stands
    for slot, index in enumerate(plan.indices):
        slots.setdefault(index, []).append(slot)
    numbers: dict[int, int] = {}  # of wanted frames, by the position of their packet
    tolerant, in_order = bool(file.positions), False
    tick = deadline(timeout)

    def read(packets_of: Callable[..., Iterator[tuple[int | None, av.Packet | None]]], threads: int) -> None:
        """Decode some packets and keep the wanted frames among those that come out."""
        with open_container(source, timeout) as container:
            stream = video_stream(container)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = threads
            stream.codec_context.options |= STRICT_OPTIONS
            count = 0
            for _, _, frames, failed in decode_packets(stream, packets_of(container, stream), tick, tolerant):
                if failed and not tolerant:
                    raise DisagreementError("packets are damaged, or some between them are missing")
                for frame in frames:
                    number, count = count if in_order else number_of(frame), count + 1
                    if number not in slots:
                        continue
                    if frame.is_corrupt:
                        raise DisagreementError(f"frame {number} is damaged")
                    if not tolerant or number == 0:
                        _check_frame(frame, file)
                    picture = file.orientation.apply(frame.to_ndarray(format="rgb24"))
                    result[slots.pop(number)] = resize_frame(picture, plan)
                    if not slots:
                        return

    def number_of(frame: av.VideoFrame) -> int | None:
        return numbers.get(frame.opaque[0]) if frame.opaque else None

    try:
        # What a decoder says of damage is alike each time only in one thread.
        if tolerant:
            numbers = {position: number for number, position in enumerate(file.positions)}
            read(all_packets, 1)
        else:
            packets = packets or scan_packets(source, timeout)
            if packets.num_frames != file.info.num_frames:
                raise DisagreementError("has other packets than when it was probed")
            if packets.torn:
                raise DisagreementError("some of its packets are damaged")
            in_order = packets.in_order
            if in_order:
                read(all_packets, threads)
            else:
                wanted = packets.position[sorted(slots)]
                numbers = dict(zip(wanted.tolist(), sorted(slots), strict=True))
                shares = _shares(_runs(packets, wanted), threads if isinstance(source, str) else 1)

                def read_share(runs: list[tuple[int, int]]) -> None:
                    packets_of = functools.partial(_packets_of_runs, packets=packets, needed=numbers, runs=runs)
                    try:
                        read(functools.partial(packets_of, seeks=packets.seekable), threads // len(shares))
                    except SeekError:
                        read(functools.partial(packets_of, seeks=False), threads // len(shares))

                # Groups of pictures are decoded side by side: a decoder's own threads wait for one another.
                others = [start(functools.partial(read_share, share)) for share in shares[1:]]
                read_share(shares[0])
                for wait in others:
                    wait(None)
    except av.FFmpegError as error:
        raise DisagreementError(f"cannot be decoded ({error.strerror})") from error
    if slots:
        raise DisagreementError(f"frame {min(slots)} is missing")
    return result


def decode_packets(
    stream: av.VideoStream,
    packets: Iterable[tuple[int | None, av.Packet | None]],
    tick: Callable[[], None],
    believes_flags: bool,
) -> Iterator[tuple[int | None, av.Packet | None, list[av.VideoFrame], bool]]:
    """Decode packets; each frame knows the position of its own.

    Args:
        packets: with their positions in decoding order, counted from 0. (position, None): decoding begins anew, at a key
            frame; (None, None): some could not be read.
        tick: called for each packet.
        believes_flags: of packets that the container marks as damaged. A transport stream's gap is told with the frame
            that was under way, which may be the one before.

    Yields:
        position, packet, the frames that came out, whose `opaque` is a list of one, the position of their packet, and
        whether the packet is damaged or some before it are missing.
    """
    stream.codec_context.flags |= Flags.copy_opaque
    frame_numbers, torn = FrameNumbers(stream), False
    for position, packet in packets:
        tick()
        frames, failed = [], position is None
        try:
            if packet is not None:
                if packet.size:
                    packet.opaque = [
                        position
                    ]  # a list: PyAV 16 takes equal numbers for one object, freed with the first
                    failed = frame_numbers.gap(packet) or (believes_flags and (packet.is_corrupt or torn))
                    torn = packet.is_corrupt
                frames = stream.decode(packet)
            elif position is not None:
                frames = stream.decode(None)
                stream.codec_context.flush_buffers()
                frame_numbers.restart()
        except av.FFmpegError:
            failed = True
        yield position, packet, frames, failed


def all_packets(
    container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[tuple[int | None, av.Packet | None]]:
    """All packets of a file for `decode_packets`, past errors; the last is empty, and empties the decoder."""
    demuxer, position = container.demux(stream), -1
    while True:
        try:
            packet = next(demuxer)
        except StopIteration:
            return
        except av.FFmpegError:
            yield None, None
            continue
        position += packet.size > 0
        yield position, packet


def _packets_of_runs(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    packets: Packets,
    needed: Container[int],
    runs: list[tuple[int, int]],
    seeks: bool,
) -> Iterator[tuple[int | None, av.Packet | None]]:
    """Packets of some runs for `decode_packets`, but for those whose frame is of no use.

    Args:
        needed: positions of packets that hold wanted frames.
        runs: of packets, in their order.
        seeks: otherwise what lies between runs is read, and not decoded.

    Raises:
        SeekError: if a key frame cannot be found by seeking.
    """
    refers = reference_test(stream)
    demuxer, position = container.demux(stream), 0  # position: of the next packet
    held: tuple[int, av.Packet] | None = None  # the packet before, if it was left out
    for begin, end in runs:
        if position != begin:
            if position:
                yield position, None
            if seeks and begin - position >= _SEEK_GAP:
                demuxer, packet, position = _seek(container, stream, packets, begin)
                if position == begin:
                    yield position, packet
                position += 1
        while position < end:
            packet = next(demuxer)
            if not packet.size:
                if packet.dts is None:
                    raise DisagreementError("it ends before its last wanted frame")
                continue
            if position >= begin:
                # Both fields of a frame, or none; parameters may stand in either.
                wanted = position in needed or refers(packet) or (packets.second[position] and held is None)
                if wanted and packets.second[position] and held is not None:
                    yield held
                held = None if wanted else (position, packet)
                if wanted:
                    yield position, packet
            position += 1
    yield position, None


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
    if orientation_of(frame, file.orientation) != file.orientation:
        raise DisagreementError("frames are rotated differently from what the track says")


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
        runs.append((begin, position + (2 if packets.second[position + 1 : position + 2].any() else 1)))
    return runs
