"""What is in a video file, from its packets alone: no frame is decoded, and header counts are not believed."""

import functools
import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import av
from PIL import Image, ImageOps

from .sampling import ClipInfo


class ClipError(ValueError):
    """A clip that cannot be shown; the message names it."""


def open_container(source: str | BinaryIO) -> av.container.InputContainer:
    """Open a video for reading. A file may not make the decoder open another file or an address."""
    if not isinstance(source, str):
        source.seek(0)
    return av.open(source, options={"protocol_whitelist": "file"} if isinstance(source, str) else {})


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The first video stream that is not a cover picture.

    Raises:
        ClipError: if there is none.
    """
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    raise ClipError("holds no video stream")


def probe(source: str | BinaryIO) -> ClipInfo:
    """Count a video's frames and read their times.

    Raises:
        ClipError: if it is not a video that can be read.
    """
    if not isinstance(source, str):
        return _probe(source)
    try:
        stat = os.stat(source)
    except OSError as error:
        raise ClipError(f"cannot be opened ({error.strerror})") from error
    return _probe_cached(source, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=16384)
def _probe_cached(path: str, size: int, mtime_ns: int) -> ClipInfo:
    return _probe(path)


def _probe(source: str | BinaryIO) -> ClipInfo:
    try:
        with open_container(source) as container:
            stream = video_stream(container)
            packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
            if not packets:
                raise ClipError("holds no video frames")
            times = sorted(float(packet.pts * packet.time_base) for packet in packets if packet.pts is not None)
            rate = stream.average_rate or stream.guessed_rate
            if stream.duration is not None:
                duration = float(stream.duration * stream.time_base)
            elif len(times) > 1:
                duration = (times[-1] - times[0]) * len(times) / (len(times) - 1)
            else:
                duration = len(packets) / float(rate or 1)
            fps = float(rate) if rate else len(packets) / duration
            return ClipInfo(len(packets), fps, duration, stream.height, stream.width)
    except av.FFmpegError as error:
        raise ClipError(f"is not a video that can be read ({error.strerror})") from error


def open_picture(source: Any) -> Image.Image:
    """A picture as a viewer shows it, upright and in RGB.

    Args:
        source: a path, a file object, bytes, a PIL image, or a dict with `bytes` or `path`.

    Raises:
        ClipError: if it is not a picture that can be read.
    """
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        picture = source if isinstance(source, Image.Image) else Image.open(source)
        return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        name = source if isinstance(source, str | Path) else "picture"
        raise ClipError(f"{name}: is not a picture that can be read ({error})") from error


def picture_size(source: Any) -> tuple[int, int]:
    """Height and width of a picture as a viewer shows it, in pixels; a file is opened, not decoded."""
    if not isinstance(source, str):
        picture = open_picture(source)
        return picture.height, picture.width
    try:
        with Image.open(source) as picture:
            turned = picture.getexif().get(0x0112) in (5, 6, 7, 8)  # EXIF orientations that swap the sides
            return (picture.width, picture.height) if turned else (picture.height, picture.width)
    except (OSError, Image.DecompressionBombError) as error:
        raise ClipError(f"{source}: is not a picture that can be read ({error})") from error
