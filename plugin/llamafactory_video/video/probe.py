"""What is in a video file, from its packets alone: no frame is decoded, and header counts are not believed.

Files are untrusted. Only containers that hold their own data are opened, from one file, and frames are bounded in size
before memory is taken for one.
"""

import functools
import itertools
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO

import av
import numpy as np

from .codecs import FrameNumbers
from .orientation import Orientation, track_orientation
from .sampling import ClipInfo, mean_rate

# The greatest frame or picture that is decoded, in pixels: twice what 8K has.
MAX_FRAME_PIXELS = 1 << 26
# Containers that hold their data themselves. Playlists and image sequences, which name other files, are not here.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegvideo,gif,asf,h264,hevc,m4v,ivf,mxf,av1,obu"
# In these, streams may turn up after the header. PyAV 16 crashes if it is given options for their decoders (its #2010).
_LATE_CONTAINERS = "avi,mpegts,mpeg,flv,ogg"
# Times are those of a constant rate if none is further off than its container's rounding, at most this (seconds).
_ROUNDING = 0.002
_JOINT = 4  # packets before a joint that may be marked
_COVER = av.stream.Disposition.attached_pic


class ClipError(ValueError):
    """A clip that cannot be shown; the message names it."""


@dataclass(frozen=True)
class VideoFile:
    """A video file as its packets describe it.

    Attributes:
        info: what is shown of it.
        height, width: of its stored frames, in pixels.
        orientation: how they are turned.
        positions: of the packets of the frames that are shown, in order of presentation, where packets told them wrong
            or the file is damaged and all of it was decoded; else empty.
        note: how much of it is lost, for a person; "" if nothing is.
        stamp: size in bytes and time of the last change in ns, as the file was when probed.
        content: a hash of its content, once it was needed.
    """

    info: ClipInfo
    height: int
    width: int
    orientation: Orientation = Orientation()  # noqa: RUF009 - frozen
    positions: tuple[int, ...] = ()
    note: str = ""
    stamp: tuple[int, int] = (0, 0)
    content: str = ""


@dataclass(frozen=True)
class Packets:
    """A stream's packets in decoding order.

    Attributes:
        pts: presentation time stamps in units of the stream's time base, (n,) int64; see `continued`.
        keys: at which decoding can begin, (n,) bool.
        shown: whose frames are shown, (n,) bool.
        second: that hold the second field of the frame before, (n,) bool.
        seconds: presentation times of the frames that are shown, sorted, (frames,) float64.
        in_order: time stamps are missing, wrong or not unique, so frames are numbered as they come out of the decoder.
        seekable: a time stamp leads to one place in the file.
        lost: why some packets are missing, or "".
        torn: others follow where some are missing.
    """

    pts: np.ndarray
    keys: np.ndarray
    shown: np.ndarray
    second: np.ndarray
    seconds: np.ndarray
    in_order: bool
    seekable: bool = True
    lost: str = ""
    torn: bool = False

    @property
    def num_frames(self) -> int:
        """Frames that are shown."""
        return len(self.seconds)

    @functools.cached_property
    def position(self) -> np.ndarray:
        """Where in decoding order the packet of each shown frame lies, in order of presentation, (frames,) int64."""
        shown = np.flatnonzero(self.shown)
        return shown[np.argsort(self.pts[shown], kind="stable")]


def file_stamp(path: str) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns.

    Raises:
        ClipError: if it is not a file that can be opened; a pipe or a device could block for ever.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise ClipError(f"cannot be opened ({getattr(error, 'strerror', error)})") from error
    if not stat.S_ISREG(found.st_mode):
        raise ClipError("is not a regular file")
    return found.st_size, found.st_mtime_ns


def open_container(
    source: str | BinaryIO, timeout: float | None = None, packets_only: bool = False
) -> av.container.InputContainer:
    """Open a video for reading. It may not make the decoder open another file or an address.

    Args:
        timeout: seconds that opening, and each read, may take.
        packets_only: nothing is to be decoded. Otherwise FFmpeg decodes some frames while it opens, to learn how far
            frames are out of order, which takes ten times as long.
    """
    decoding = {"max_pixels": str(MAX_FRAME_PIXELS)} | ({"skip_frame": "all"} if packets_only else {})
    reading = {"protocol_whitelist": "file" if isinstance(source, str) else "none"}

    def attempt(formats: str, options: dict[str, str], container_options: dict[str, str]) -> Any:
        if not isinstance(source, str):
            source.seek(0)
        # With `file:` a name such as concat:a|b or http://… is that of a file as well.
        name = f"file:{source}" if isinstance(source, str) else source
        container_options = {**container_options, "format_whitelist": formats}
        return av.open(name, "r", None, options, container_options, metadata_errors="replace", timeout=timeout)

    try:
        return attempt(_CONTAINERS, decoding, reading)
    except av.error.ValueError:  # a container that is not among them
        pass
    if packets_only:
        container = attempt(_LATE_CONTAINERS, {}, {**reading, "codec_whitelist": "none"})
        if all(stream.codec_context is None or stream.width for stream in container.streams.video):
            return container
        container.close()  # the size of some codecs' frames is known to the decoder alone
    return attempt(_LATE_CONTAINERS, {}, reading)


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The first video stream that is not a cover picture, as every reader but the players takes it.

    Raises:
        ClipError: if there is none, no decoder for it, or its frames are too large.
    """
    for stream in container.streams.video:
        if stream.disposition & _COVER:
            continue
        if stream.codec_context is None:
            raise ClipError("holds video in a format that cannot be decoded")
        if stream.width * stream.height > MAX_FRAME_PIXELS:
            raise ClipError(
                f"has frames of {stream.width} x {stream.height}; at most {MAX_FRAME_PIXELS} pixels are decoded"
            )
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        return stream
    raise ClipError("holds no video stream")


def _scan(container: av.container.InputContainer, stream: av.VideoStream) -> Packets:
    pts, dts, keys, shown, second, corrupt, lost = [], [], [], [], [], [], ""
    hides = stream.codec_context.name == "vp8"  # some of its frames are not shown: the fifth bit of the first byte
    fields = FrameNumbers(stream)
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.is_corrupt:
                corrupt.append(len(pts))
            pts.append(packet.pts)
            dts.append(packet.dts)
            keys.append(packet.is_keyframe)
            second.append(fields.may_have_fields and fields.is_second_field(packet))
            hidden = hides and not bytes(packet)[0] & 0x10
            shown.append(not (packet.is_discard or packet.is_corrupt or hidden or second[-1]))
    except av.FFmpegError as error:
        lost = f"it cannot be read to its end ({error.strerror})"
    frame = round(1 / float((stream.average_rate or stream.guessed_rate or 25) * stream.time_base))
    pts, joints = continued(pts, dts, keys, frame)
    # Where parts were joined, FFmpeg misses packets of the transport stream, and marks frames that are whole. Decoding
    # them tells.
    for position in [p for p in corrupt if any(p < joint <= p + _JOINT for joint in joints)]:
        corrupt.remove(position)
        shown[position] = not second[position]
    torn = bool(corrupt) and corrupt[0] < len(pts) - 1
    if corrupt and not lost:
        lost = "some of its packets are damaged" if torn else "it ends in the middle of a frame"
    if not any(shown):
        raise ClipError("holds no video frames" + (f"; {lost}" if lost else ""))
    if not lost and stream.frames > len(pts) and "mp4" in container.format.name:  # AVI counts frames left out too
        lost = f"its header promises {stream.frames} frames"
    visible = [stamp for stamp, show in zip(pts, shown, strict=True) if show]
    stamps = visible if None not in visible else [stamp for stamp, show in zip(dts, shown, strict=True) if show]
    if None in stamps:
        seconds = np.arange(len(stamps)) / float(stream.average_rate or stream.guessed_rate or 1)
    else:
        seconds = np.sort(np.array(stamps, np.int64)) * float(stream.time_base)
    # AVI has no times of presentation; FFmpeg makes them up, for these codecs in the wrong order.
    invented = container.format.name == "avi" and stream.codec_context.name in ("h264", "hevc", "mpeg4")
    in_order = None in pts or len(set(visible)) < len(visible) or invented
    array = np.array([0 if stamp is None else stamp for stamp in pts], np.int64)
    flags = (np.array(values) for values in (keys, shown, second))
    return Packets(array, *flags, seconds, in_order, not joints, lost, torn)


def continued(
    pts: Sequence[int | None], dts: Sequence[int | None], keys: Sequence[bool], frame: int
) -> tuple[list[int | None], list[int]]:
    """Time stamps that continue where a file's parts, joined into one, each start at zero again, as players show them.

    Args:
        pts, dts: of packets in decoding order.
        keys: at which a part can begin.
        frame: how long one is.

    Returns:
        Presentation time stamps, and the numbers of the packets at which they start anew.
    """
    joints = [i for i in range(1, len(dts)) if keys[i] and None not in (dts[i], dts[i - 1]) and dts[i] < dts[i - 1]]
    result = list(pts)
    for begin, end in itertools.pairwise([*joints, len(pts)]):
        before = [stamp for stamp in result[:begin] if stamp is not None]
        part = [stamp for stamp in result[begin:end] if stamp is not None]
        if before and part:
            shift = max(before) + frame - min(part)
            result[begin:end] = [None if stamp is None else stamp + shift for stamp in result[begin:end]]
    return result, joints


def scan_packets(source: str | BinaryIO, timeout: float | None = None) -> Packets:
    """All packets of a video's stream, of which none is decoded.

    Raises:
        ClipError: if there are none.
    """
    with open_container(source, timeout, packets_only=True) as container:
        return _scan(container, video_stream(container))


def frame_rate(seconds: np.ndarray, header: Fraction | None, tick: float) -> tuple[float, bool]:
    """Frames per second of sorted presentation times, and whether the rate is constant.

    The header's rate is taken if the times bear it out, then the nearest of the usual rates, then what the times say.

    Args:
        seconds: (n,).
        tick: the container's unit of time, in seconds.
    """
    n = len(seconds)
    if n < 2 or seconds[-1] <= seconds[0]:
        return float(header or 1), True
    measured = (n - 1) / (seconds[-1] - seconds[0])
    numbers = np.arange(n)
    for rate in (header, round(measured), Fraction(round(measured * 1.001) * 1000, 1001), measured):
        if rate and np.abs(seconds - seconds[0] - numbers / float(rate)).max() <= min(tick, _ROUNDING) + 1e-9:
            return float(rate), True
    return mean_rate(n, float(seconds[-1] - seconds[0])), False


def describe(
    stream: av.VideoStream,
    seconds: np.ndarray,
    orientation: Orientation,
    size: tuple[int, int],
) -> ClipInfo:
    """What is shown of frames at `seconds`, (n,) sorted, of stored `size` (height, width)."""
    rate, constant = frame_rate(seconds, stream.average_rate, float(stream.time_base))
    height, width = size
    aspect = stream.sample_aspect_ratio
    width = width if not aspect else max(1, round(width * aspect))
    if orientation.transpose:
        height, width = width, height
    times = () if constant else tuple((seconds - seconds[0]).tolist())
    header = float(stream.average_rate) if stream.average_rate else None
    return ClipInfo(len(seconds), rate, len(seconds) / rate, height, width, times, None if header == rate else header)


def probe(source: str | BinaryIO, timeout: float | None = None) -> tuple[VideoFile, Packets]:
    """Count a video's frames and read their times, size and orientation; and its packets.

    Raises:
        ClipError: if it is not a video that can be read.
    """
    stamp = file_stamp(source) if isinstance(source, str) else (0, 0)
    try:
        with open_container(source, timeout, packets_only=True) as container:
            stream = video_stream(container)
            packets = _scan(container, stream)
            orientation = Orientation()
            if "mp4" in container.format.name:
                orientation = track_orientation(source, stream.id)
            size = stream.height, stream.width
            info = describe(stream, packets.seconds, orientation, size)
            promised = f" of {stream.frames}" if stream.frames > info.num_frames else ""
            note = f"only {info.num_frames}{promised} frames can be read: {packets.lost}" if packets.lost else ""
            file = VideoFile(info, *size, orientation, note=note, stamp=stamp)
        # A file replaced meanwhile is described by nothing of this.
        if isinstance(source, str) and file_stamp(source) != stamp:
            return probe(source, timeout)
        return file, packets
    except av.FFmpegError as error:
        raise ClipError(f"is not a video that can be read ({error.strerror})") from error
