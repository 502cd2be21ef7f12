"""How stored frames are turned, as a display matrix or the track header of an MP4 file says."""

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
import numpy as np


@dataclass(frozen=True)
class Orientation:
    """How stored frames are turned to stand as a player shows them: first transposed, then flipped."""

    transpose: bool = False
    flip_horizontal: bool = False
    flip_vertical: bool = False

    def apply(self, frame: np.ndarray) -> np.ndarray:
        """A stored frame (H, W, 3) as a player shows it, a view."""
        frame = frame.swapaxes(0, 1) if self.transpose else frame
        return frame[:: -1 if self.flip_vertical else 1, :: -1 if self.flip_horizontal else 1]

    @property
    def rotation(self) -> int:
        """Degrees by which it is turned counterclockwise, as `av.VideoFrame.rotation`, but from 0 to 270."""
        if self.transpose:
            return 90 if self.flip_vertical else 270
        return 180 if self.flip_horizontal else 0

    @classmethod
    def of_matrix(cls, matrix: Sequence[int]) -> "Orientation":
        """From a display matrix in rows (a, b, u), (c, d, v), (x, y, w), as MP4 and FFmpeg have it."""
        a, b, _, c, d = matrix[:5]
        if abs(a) >= abs(b):
            return cls(False, a < 0, d < 0)
        return cls(True, c < 0, b < 0)


def _boxes(file: BinaryIO, end: int) -> Any:
    """Type, and start and end of the content, of each box of an MP4 file from the current position up to `end`."""
    while (start := file.tell()) + 8 <= end:
        size, kind = struct.unpack(">I4s", file.read(8))
        if size == 1:
            size = struct.unpack(">Q", file.read(8).rjust(8, b"\0"))[0]
        stop = end if size == 0 else start + size
        if stop <= start or stop > end:
            return
        yield kind, file.tell(), stop
        file.seek(stop)


def track_orientation(source: str | BinaryIO, track_id: int) -> Orientation:
    """The orientation in the track header of an MP4 or MOV file (ISO/IEC 14496-12, 8.3.2).

    PyAV does not tell it before a frame is decoded.
    """
    file = open(source, "rb") if isinstance(source, str) else source  # noqa: SIM115
    try:
        end = file.seek(0, io.SEEK_END)
        file.seek(0)
        for kind, start, stop in _boxes(file, end):
            if kind != b"moov":
                continue
            file.seek(start)
            for track, inside, track_end in _boxes(file, stop):
                if track != b"trak":
                    continue
                file.seek(inside)
                for header, begin, _ in _boxes(file, track_end):
                    if header == b"tkhd":
                        file.seek(begin)
                        content = file.read(96)
                        long = content[0] == 1  # version 1 has 64-bit times
                        if struct.unpack_from(">I", content, 20 if long else 12)[0] == track_id:
                            return Orientation.of_matrix(struct.unpack_from(">9i", content, 52 if long else 40))
    except (struct.error, IndexError):
        pass  # whatever the decoder finds in place of it is compared when frames are decoded
    finally:
        if isinstance(source, str):
            file.close()
    return Orientation()


def orientation_of(frame: av.VideoFrame, expected: Orientation = Orientation()) -> Orientation:
    """How a decoded frame is turned.

    Args:
        expected: how its file says that it is, which is believed where the frame's own rotation bears it out and no more
            of the frame can be read: PyAV 16 reads no side data at all if one item is of a kind unknown to it, such as
            the views of spatial video.
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        rotation = frame.rotation % 360
        return expected if expected.rotation == rotation else _OF_ROTATION[round(rotation / 90) * 90 % 360]
    return Orientation() if matrix is None else Orientation.of_matrix(struct.unpack("<9i", bytes(matrix)))


_OF_ROTATION = {
    0: Orientation(),
    90: Orientation(True, False, True),
    180: Orientation(False, True, True),
    270: Orientation(True, True, False),
}
