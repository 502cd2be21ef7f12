"""What the first bytes of a packet tell of its frame: whether others refer to it, whether one before it is missing,
and whether it is the second field of a frame."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import av


def reference_test(stream: av.VideoStream) -> Callable[[av.Packet], bool]:
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
    """The units of a packet that are long enough to tell something.

    Args:
        length: bytes of the length that stands before each unit; 0: a start code 00 00 01 does.
    """
    at = 0 if length else data.find(b"\0\0\1") + 3
    while at + length < len(data) and (length or at > 2):
        begin = at + length
        if length:
            at = end = begin + int.from_bytes(data[at:begin])
        else:
            following = data.find(b"\0\0\1", begin)
            end, at = (len(data), 0) if following < 0 else (following, following + 3)
        if begin + 3 <= len(data):
            yield data[begin : max(end, begin + 3)]


class FrameNumbers:
    """Follows `frame_num` of an H.264 stream, which counts the frames that others refer to: a lost one leaves a gap.

    FFmpeg fills such a gap with another picture and says nothing. After ITU-T H.264, 7.3.2.1.1, 7.3.3 and 7.4.3.

    Args:
        stream: of any codec; only H.264 has gaps. A count that begins anew without a key frame (memory management
            control operation 5, 8.2.5.4, which no encoder in use sends) is taken for one.
    """

    def __init__(self, stream: av.VideoStream) -> None:
        extra = stream.codec_context.extradata or b""
        packed = extra[:1] == b"\1" and len(extra) > 6  # MP4 and Matroska put a unit's length before it
        self._length = (extra[4] & 3) + 1 if packed else 0
        self._h264 = stream.codec_context.name == "h264"
        self._sequences: dict[int, _Sequence] = {}
        self._pictures: dict[int, int] = {}
        self._last: int | None = None
        self._field: tuple[int, bool] | None = None  # frame_num and parity of a first field, whose second may follow
        if self._h264:
            with contextlib.suppress(IndexError):  # cut off, as decoding will tell
                for unit in _parameter_sets(extra) if packed else _units(extra, 0):
                    self._take_parameters(unit)

    def restart(self) -> None:
        """Decoding begins anew, at a key frame."""
        self._last = None

    def gap(self, packet: av.Packet) -> bool:
        """Whether a frame that others refer to is missing between the packet before and this one."""
        found = False
        for unit in _units(bytes(packet), self._length) if self._h264 else ():
            try:
                self._take_parameters(unit)
                found |= self._is_gap(unit)
            except (IndexError, KeyError):  # damaged, as decoding it will tell
                continue
        return found

    @property
    def may_have_fields(self) -> bool:
        """Whether a packet may hold one field of an interlaced frame alone."""
        return self._h264 and (not self._sequences or any(not s.frames_only for s in self._sequences.values()))

    def is_second_field(self, packet: av.Packet) -> bool:
        """Whether a packet holds the second field of the frame whose first the packet before it held (7.4.1.2.4)."""
        for unit in _units(bytes(packet), self._length):
            try:
                self._take_parameters(unit)
                if unit[0] & 31 not in (1, 2, 5):
                    continue
                number, parity = self._slice(unit)[1:]
            except (IndexError, KeyError):  # damaged, as decoding it will tell
                continue
            second = parity is not None and self._field == (number, not parity)
            self._field = None if second or parity is None else (number, parity)
            return second
        return False

    def _take_parameters(self, unit: bytes) -> None:
        if unit[0] & 31 == 7:
            bits = _Bits(unit[1:])
            profile = bits.read(24) >> 16
            number = bits.golomb()
            planes = False
            if profile in (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135):
                chroma = bits.golomb()
                planes = chroma == 3 and bool(bits.read(1))
                bits.golomb(), bits.golomb(), bits.read(1)  # bit depths, lossless
                if bits.read(1):
                    for i in range(12 if chroma == 3 else 8):
                        if bits.read(1):
                            bits.scaling_list(16 if i < 6 else 64)
            width = bits.golomb() + 4
            order = bits.golomb()
            if order == 0:
                bits.golomb()
            elif order == 1:
                bits.read(1), bits.golomb(), bits.golomb()
                for _ in range(min(bits.golomb(), 255)):
                    bits.golomb()
            bits.golomb()
            gaps_allowed = bool(bits.read(1))
            bits.golomb(), bits.golomb()  # width and height
            self._sequences[number] = _Sequence(width, planes, gaps_allowed, bool(bits.read(1)))
        elif unit[0] & 31 == 8:
            bits = _Bits(unit[1:17])
            self._pictures[bits.golomb()] = bits.golomb()

    def _slice(self, unit: bytes) -> tuple["_Sequence", int, bool | None]:
        """Of a slice: its parameters, its frame_num, and of a field whether it is the bottom one; None: of a frame."""
        bits = _Bits(unit[1:33])
        if bits.golomb():
            raise KeyError("not the first slice of its picture")
        bits.golomb()
        sequence = self._sequences[self._pictures[bits.golomb()]]
        bits.read(2 if sequence.planes else 0)
        number = bits.read(sequence.number_bits)
        is_field = not sequence.frames_only and bits.read(1)
        return sequence, number, bool(bits.read(1)) if is_field else None

    def _is_gap(self, unit: bytes) -> bool:
        kind, referred = unit[0] & 31, unit[0] >> 5 & 3
        if kind not in (1, 2, 5):
            return False
        sequence, number, _ = self._slice(unit)
        last, size = self._last, 1 << sequence.number_bits
        if referred or number != last:
            self._last = number if referred else (number - 1) % size
        if kind == 5 or last is None or sequence.gaps_allowed:
            return False
        return number not in (last, (last + 1) % size)


class _Sequence(NamedTuple):
    """Of a sequence parameter set: bits of frame_num, whether colour planes are apart, and two flags."""

    number_bits: int
    planes: bool
    gaps_allowed: bool
    frames_only: bool


def _parameter_sets(extra: bytes) -> Iterator[bytes]:
    """Those in an AVCDecoderConfigurationRecord (ISO/IEC 14496-15, 5.3.3.1): sequences', then pictures'."""
    at = 5
    for counted in (31, 255):
        count, at = extra[at] & counted, at + 1
        for _ in range(count):
            end = at + 2 + int.from_bytes(extra[at : at + 2])
            yield extra[at + 2 : end]
            at = end


class _Bits:
    """Reads the bits of a unit (ITU-T H.264, 7.2 and 9.1), without the bytes that only keep start codes apart."""

    def __init__(self, unit: bytes) -> None:
        self.data, self.at = unit.replace(b"\0\0\3", b"\0\0"), 0

    def read(self, count: int) -> int:
        value = 0
        for _ in range(count):
            value = value << 1 | self.data[self.at >> 3] >> (7 - (self.at & 7)) & 1
            self.at += 1
        return value

    def golomb(self) -> int:
        zeros = 0
        while not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)

    def scaling_list(self, count: int) -> None:
        last = following = 8
        for _ in range(count):
            if following:
                coded = self.golomb()
                following = (last + (coded + 1) // 2 * (1 if coded % 2 else -1)) % 256
            last = following or last
