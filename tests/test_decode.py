"""What `ClipReader.read` yields is what was planned, and what a plain PyAV loop yields, on files drawn here (drawing.py)."""

import itertools
import os
import resource
import struct
import threading
import time
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from conftest import SHARED, examples
from drawing import X265, number_in, picture, write
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from llamafactory_video.media import Clip
from llamafactory_video.video import decode
from llamafactory_video.video import reader as clip_module
from llamafactory_video.video.decode import resize_frame
from llamafactory_video.video.orientation import orientation_of
from llamafactory_video.video.pictures import open_picture, picture_size
from llamafactory_video.video.probe import ClipError, probe
from llamafactory_video.video.reader import ClipReader
from llamafactory_video.video.sampling import Sampling

SAMPLING = Sampling("qwen_finetune", fps=4, min_frames=2, max_frames=8, min_pixels=4096, max_pixels=10**8)
FIELDS = SHARED / "cases" / "avchd_fields.mts"
EVERY = {"fps": 1000.0, "max_frames": 1000}  # every frame of a clip


def stored_matrix(frame):
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return None if matrix is None else struct.unpack("<9i", bytes(matrix))


def turned(stored, matrix):
    """A stored picture as a player shows it: pixel (x, y) stands at (a x + c y, b x + d y)."""
    if matrix is None:
        return stored
    a, b, c, d = (round(matrix[i] / max(map(abs, matrix[:5]))) for i in (0, 1, 3, 4))
    y, x = np.indices(stored.shape[:2])
    across, down = a * x + c * y, b * x + d * y
    shown = np.zeros((np.ptp(down) + 1, np.ptp(across) + 1, 3), np.uint8)
    shown[down - down.min(), across - across.min()] = stored
    return shown


def plain(path):
    """Pictures, as a player shows them, and times of all frames of the first video stream, by the plainest loop."""
    pictures, times = [], []
    with av.open(f"file:{path}", timeout=20, metadata_errors="replace") as container:
        stream = next(
            one for one in container.streams.video if not one.disposition & av.stream.Disposition.attached_pic
        )
        for frame in container.decode(stream):
            pictures.append(turned(frame.to_ndarray(format="rgb24"), stored_matrix(frame)))
            times.append(None if frame.pts is None else float(frame.pts * frame.time_base))
    return pictures, times


def check(
    path,
    first=0,
    stamped=True,
    numbered=True,
    constant=True,
    counted=False,
    sampling=SAMPLING,
    threads=(1, 2),
    clips=None,
    loop=None,
):
    """Show a clip in several ways and compare it with the plain loop; the last that was shown.

    Args:
        first: the number of the first picture.
        stamped: the frames' time stamps are right.
        numbered: the numbers are read from the pictures too.
        constant: the rate is, so that all frames can be asked for.
        counted: the packets tell it wrong, so the file is decoded as a whole; None: it may be.
        clips: settings of the clips to be shown; default: some frames, all, and a span.
    """
    pictures, times = loop or plain(path)
    for count, own in itertools.product(threads, clips or ({}, EVERY, {"start": 0.4, "end": 1.1})):
        if clips is None and "start" in own and len(pictures) < 12:
            continue
        reader = ClipReader(sampling, threads=count)
        shown = reader.read(Clip(str(path), **own))
        plan = shown.plan
        assert plan == reader.plan(Clip(str(path), **own)).plan
        assert counted in (None, bool(reader._files[str(path)].positions))
        if own is EVERY and constant:
            assert sorted(set(plan.indices)) == list(range(len(pictures)))
        for place, (index, at) in enumerate(zip(plan.indices, plan.times, strict=True)):
            assert np.array_equal(shown.frames[place], resize_frame(pictures[index], plan)), (path, own, index)
            if numbered:
                assert number_in(pictures[index]) == first + index
            if stamped:
                origin = times[plan.indices[0] if "start" in own else 0]
                assert abs(times[index] - origin - at) < 0.003, (own, index)
                if "start" in own:
                    assert own["start"] - 0.003 <= times[index] - times[0] < own["end"] + 0.003
    return shown


RANDOM_GAPS = np.cumsum(np.random.default_rng(1).integers(20, 400, 24))
B_FRAMES = {"bf": "3", "g": "12"}
FILES = {
    **{f"h264.{kind}": dict(options=B_FRAMES) for kind in ("mp4", "mov", "mkv", "avi", "ts", "flv")},
    "no B.mp4": dict(options={"bf": "0", "g": "8"}),
    "pyramid.mp4": dict(options={"x264-params": "bframes=7:b-pyramid=normal:b-adapt=0:keyint=15:scenecut=0:ref=4"}),
    "open gop.mp4": dict(options={"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=6:scenecut=0"}),
    "open gop.ts": dict(options={"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=6:scenecut=0"}),
    "refresh.mp4": dict(options={"x264-params": "intra-refresh=1:keyint=6"}),
    "short gop.mp4": dict(options={"g": "2"}),
    "intra.mkv": dict(options={"g": "1"}),
    "hevc.mp4": dict(codec="libx265", options={"bf": "3", "g": "8"}),
    "hevc.mkv": dict(codec="libx265", options={"bf": "3", "g": "8"}),
    "hevc.ts": dict(codec="libx265", options={"bf": "3", "g": "8"}),
    "hevc open.mp4": dict(
        codec="libx265", options={"x265-params": X265["x265-params"] + ":open-gop=1:keyint=6:min-keyint=6:bframes=3"}
    ),
    "hevc closed.mkv": dict(
        codec="libx265", options={"x265-params": X265["x265-params"] + ":open-gop=0:keyint=6:bframes=3"}
    ),
    "vp8.webm": dict(codec="libvpx", options={"deadline": "realtime", "g": "9"}),
    "vp9.webm": dict(codec="libvpx-vp9", options={"cpu-used": "8", "lag-in-frames": "12", "auto-alt-ref": "1"}),
    "live.webm": dict(codec="libvpx-vp9", options={"deadline": "realtime", "g": "9"}, container_options={"live": "1"}),
    "av1.mkv": dict(codec="libsvtav1", options={"preset": "12", "g": "9"}),
    "av1.mp4": dict(codec="libaom-av1", options={"cpu-used": "8", "usage": "realtime", "g": "9"}),
    "mpeg4.mp4": dict(codec="mpeg4", options={"bf": "2", "g": "9"}),
    "mpeg4.avi": dict(codec="mpeg4", options={"bf": "2", "g": "9"}),
    "mpeg2.ts": dict(codec="mpeg2video", options={"bf": "2", "g": "9"}, rate=25),
    "mpeg2.mpg": dict(codec="mpeg2video", options={"bf": "2", "g": "9"}, rate=25),
    "mjpeg.avi": dict(codec="mjpeg", pix_fmt="yuvj420p"),
    "gif.gif": dict(codec="gif", pix_fmt="rgb8"),
    "delays.gif": dict(codec="gif", pix_fmt="rgb8", stamps=RANDOM_GAPS),
    "prores.mov": dict(codec="prores_ks", pix_fmt="yuv422p10le"),
    "ffv1.mkv": dict(codec="ffv1"),
    "wmv.asf": dict(codec="wmv2"),
    "h263.mov": dict(codec="h263", size=(96, 128)),
    "h263.flv": dict(codec="flv"),
    "10 bit.mp4": dict(pix_fmt="yuv420p10le", options=B_FRAMES),
    "10 bit hevc.mp4": dict(codec="libx265", pix_fmt="yuv420p10le", options={"g": "9"}),
    "interlaced.mp4": dict(options={"flags": "+ilme+ildct", **B_FRAMES}),
    "interlaced.ts": dict(codec="mpeg2video", options={"flags": "+ilme+ildct", "bf": "2"}, rate=25),
    "odd.mp4": dict(pix_fmt="yuv444p", size=(65, 97), options=B_FRAMES),
    "odd.mkv": dict(codec="libvpx-vp9", pix_fmt="yuv444p", size=(97, 65), options={"cpu-used": "8"}),
    "one.mp4": dict(frames=1),
    "one.webm": dict(codec="libvpx", frames=1),
    "fragments.mp4": dict(options={"g": "6"}, container_options={"movflags": "frag_keyframe+empty_moov"}),
    "sound.mp4": dict(options=B_FRAMES, audio=True),
    "sound.ts": dict(options=B_FRAMES, audio=True),
    "two.mkv": dict(streams=2),
    "two.mp4": dict(streams=2, options=B_FRAMES),
    "late.mkv": dict(late=60, options=B_FRAMES),
    "late.mp4": dict(late=60, options=B_FRAMES),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_shown_as_the_plain_loop_yields_it(tmp_path, name):
    made = FILES[name]
    check(
        write(tmp_path / name, **made),
        stamped=not name.endswith(".avi"),  # AVI has no times of presentation
        constant="stamps" not in made,
        counted=None if name == "refresh.mp4" else False,  # it has no whole key frames
    )


@pytest.mark.parametrize(
    "made",
    [dict(options=B_FRAMES), dict(codec="mpeg2video", options={"bf": "2", "g": "9"}), dict(options={"bf": "0"})],
)
def test_times_that_start_anew_in_a_joined_file_go_on(tmp_path, made):
    """As players have it: parts of a stream, each from 0 on, laid end to end."""
    parts = [
        write(tmp_path / f"{i}.ts", frames=count, first=first, rate=25, **made)
        for i, first, count in ((0, 0, 40), (1, 40, 25), (2, 65, 30))
    ]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    loops = [plain(part) for part in parts]
    pictures = [picture for shown, _ in loops for picture in shown]
    times = (np.arange(95) / 25).tolist()
    check(path, loop=(pictures, times), clips=[{}, EVERY, {"start": 1.2, "end": 3.1}, {"fps": 1.0, "max_frames": 3}])
    info = probe(str(path))[0].info
    assert (info.num_frames, info.fps, info.duration, info.times) == (95, 25.0, 3.8, ())


def packed_avi(path):
    """MPEG-4 with each B frame in the packet of the frame that it refers to, and an empty one after it, as DivX wrote it."""
    source = write(path.with_name("plain.avi"), codec="mpeg4", options={"bf": "1", "g": "12"}, frames=25)
    with av.open(str(source)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    start, chunks = b"\0\0\1\xb6", []
    kinds = [packet[packet.index(start) + 4] >> 6 for packet in packets]
    for packet, kind, following in zip(packets, kinds, [*packets[1:], b""], strict=True):
        if kind == 2:  # a B frame
            chunks.append(start + b"\x50\x00\x7f")
        else:
            packs = following and kinds[packets.index(following)] == 2
            chunks.append(packet + following if packs else packet)
    at = chunks[0].index(start)
    chunks[0] = chunks[0][:at] + b"\0\0\1\xb2DivX503b1393p" + chunks[0][at:]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 96, 64, "yuv420p", Fraction(1, 12)
        for number, chunk in enumerate(chunks):
            packet = av.Packet(chunk)
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, stream.time_base, number, number
            packet.is_keyframe = kinds[number] == 0
            container.mux(packet)
    return path


def test_packed_frames_of_avi_keep_their_order(tmp_path):
    path = packed_avi(tmp_path / "packed.avi")
    with av.open(str(path)) as container:
        stamps = [frame.pts for frame in container.decode(video=0)]
    assert len(stamps) == 25 and stamps != sorted(stamps)  # what FFmpeg makes up
    check(path, stamped=False)


@pytest.mark.skipif(not FIELDS.is_file(), reason="../shared/cases is not present")
def test_fields_in_packets_of_their_own_are_one_frame():
    """AVCHD of a camcorder: 26 packets, 13 frames."""
    pictures, times = plain(FIELDS)
    assert len(pictures) == 13
    sampling = SAMPLING.override(fps=25.0, max_pixels=10**9)
    shown = check(
        FIELDS, sampling=sampling, numbered=False, clips=[{}, EVERY, {"max_frames": 4}], loop=(pictures, times)
    )
    assert len(shown.plan.indices) == 4
    file, packets = probe(str(FIELDS))
    assert (file.info.num_frames, file.info.fps, file.info.times, len(packets.pts)) == (13, 25.0, (), 26)


def test_hidden_frames_of_vp8_are_not_counted(tmp_path):
    numbers = itertools.count()

    def hide(packet):
        data = bytearray(bytes(packet))
        if next(numbers) in (5, 6, 15):
            data[0] &= ~0x10  # show_frame
        changed = av.Packet(bytes(data))
        changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
        changed.stream, changed.is_keyframe = packet.stream, packet.is_keyframe
        return changed

    options = {"deadline": "realtime", "g": "9", "lag-in-frames": "0"}
    path = write(tmp_path / "hidden.webm", "libvpx", options=options, change=hide)
    shown = check(path, numbered=False, constant=False)
    numbers = [number for number in range(24) if number not in (5, 6, 15)]
    assert [number_in(frame) for frame in plain(path)[0]] == numbers
    assert [number_in(frame) for frame in shown.frames] == [numbers[index] for index in shown.plan.indices]


def test_a_cover_picture_is_passed_over(tmp_path):
    cover = write(tmp_path / "cover.avi", "mjpeg", "yuvj420p", frames=1, first=77)
    with av.open(str(cover)) as container:
        data = bytes(next(container.demux(video=0)))
    path = tmp_path / "covered.mkv"
    with av.open(str(path), "w") as container:
        container.add_attachment("cover.jpg", "image/jpeg", data)
        stream = container.add_stream("libx264", rate=12)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for i in range(24):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    check(path)


def test_sound_alone_is_refused_by_name(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ClipError, match=r"sound\.mp4: holds no video stream"):
        ClipReader(SAMPLING).plan(str(path))


@examples(40, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_packets_left_out_key_frames_jumped_to_and_parallel_runs_change_nothing(tmp_path, data):
    draw = lambda strategy: data.draw(strategy)  # noqa: E731
    codec = draw(st.sampled_from(["libx264", "libx264", "libx264", "libx265", "mpeg4", "mpeg2video"]))
    suffix = draw(st.sampled_from(["mp4", "mkv", "ts"] if codec != "mpeg2video" else ["mkv", "ts"]))
    gop, bframes, frames = draw(st.integers(1, 20)), draw(st.integers(0, 5)), draw(st.integers(1, 60))
    options = {"g": str(gop), "bf": str(bframes)}
    if codec == "libx264":
        extra = draw(
            st.sampled_from(["open-gop=0", "open-gop=1", "b-pyramid=normal:ref=4", "b-pyramid=none", "aud=1"])
        )
        options["x264-params"] = f"b-adapt=0:{extra}"
    elif codec == "libx265":
        extra = draw(st.sampled_from(["open-gop=0", "open-gop=1", "b-pyramid=1:temporal-layers=3", "b-pyramid=0"]))
        options["x265-params"] = f"{X265['x265-params']}:b-adapt=0:{extra}:keyint={gop}:min-keyint={gop}"
    path = write(tmp_path / f"{codec}.{suffix}", codec, options=options, frames=frames, rate=25)
    loop = plain(path)
    assert len(loop[0]) == frames
    # With an open GOP, x264 has pictures from before a key frame forgotten after it. Where a jump has passed these over, FFmpeg
    # takes that for damage, and the file is decoded as a whole.
    counted = None if codec == "libx264" and extra == "open-gop=1" else False
    for _ in range(3):
        own = {"fps": draw(st.floats(0.3, 30))}
        if frames > 1 and draw(st.booleans()):
            begin = draw(st.integers(0, frames - 2))
            own |= {"start": begin / 25 - 0.01, "end": draw(st.integers(begin + 1, frames)) / 25 - 0.01}
        own["max_frames"] = draw(st.integers(1, 40))
        own["min_frames"] = draw(st.integers(1, own["max_frames"]))
        check(path, counted=counted, threads=(1, 2, 3), clips=[own], loop=loop)


class Spy:
    """Stands before a container or a stream and counts what is asked of it."""

    def __init__(self, real, counts):
        self.__dict__.update(real=real, counts=counts)

    def __getattr__(self, name):
        return getattr(self.real, name)

    def __setattr__(self, name, value):
        setattr(self.real, name, value)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.real.close()

    def demux(self, stream):
        for packet in self.real.demux(getattr(stream, "real", stream)):
            self.counts["read"] += 1
            yield packet

    def seek(self, stamp, stream):
        self.counts["seeks"] += 1
        self.real.seek(stamp, stream=stream.real)

    def decode(self, packet):
        self.counts["packets"] += packet is not None
        frames = self.real.decode(packet)
        self.counts["frames"] += len(frames)
        return frames


@pytest.fixture
def counts(monkeypatch):
    """How much is read and decoded."""
    found = {"read": 0, "seeks": 0, "packets": 0, "frames": 0}
    real_open, real_stream = decode.open_container, decode.video_stream
    monkeypatch.setattr(decode, "open_container", lambda *a, **k: Spy(real_open(*a, **k), found))
    monkeypatch.setattr(decode, "video_stream", lambda container: Spy(real_stream(container.real), found))
    return found


@pytest.mark.parametrize(
    "name, made",
    [
        ("h264.mp4", dict(options={"x264-params": "bframes=3:b-pyramid=none:b-adapt=0:keyint=250"})),
        ("hevc.mp4", dict(codec="libx265", options={"bf": "3"})),
        ("mpeg4.mp4", dict(codec="mpeg4", options={"bf": "2", "g": "100"})),
        ("mpeg2.ts", dict(codec="mpeg2video", options={"bf": "2", "g": "100"}, rate=25)),
    ],
)
def test_packets_of_no_use_are_left_out(tmp_path, counts, name, made):
    path = write(tmp_path / name, frames=60, **made)
    check(path, threads=(1,), clips=[{"max_frames": 4}])
    assert 4 <= counts["frames"] <= counts["packets"] < 45


@pytest.mark.parametrize("name", ["long.mp4", "long.mkv", "long.ts"])
def test_key_frames_are_jumped_to(tmp_path, counts, name):
    path = write(tmp_path / name, options={"g": "12", "preset": "ultrafast"}, frames=1000, rate=25)
    check(path, threads=(1,), clips=[{"max_frames": 5}])
    assert counts["seeks"] >= 3
    assert counts["packets"] < 0.1 * 1000
    assert counts["read"] < 0.3 * 1000


def box(data, *kinds):
    """Where the content of the first box of these nested kinds begins in an MP4 file."""
    at = 0
    for kind in kinds:
        at = data.index(kind, at) + 4
    return at


def replaced(path, at, new):
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    path.write_bytes(data)
    return path


MATRICES = [
    matrix for matrix in itertools.product((-1, 0, 1), repeat=4) if abs(np.linalg.det(np.reshape(matrix, (2, 2)))) == 1
]
MATRICES = [matrix for matrix in MATRICES if matrix[0] * matrix[1] == 0 and matrix[2] * matrix[3] == 0]


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_turned_clips_stand_as_a_player_shows_them(tmp_path, caplog, matrix):
    path = write(tmp_path / "turned.mp4", options=B_FRAMES)
    a, b, c, d = (value << 16 for value in matrix)
    rows = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    replaced(path, box(path.read_bytes(), b"moov", b"trak", b"tkhd") + 40, struct.pack(">9i", *rows))
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0))
    assert (matrix == (1, 0, 0, 1)) == (stored_matrix(stored) is None)
    assert stored_matrix(stored) in (None, rows)
    shown = check(path, numbered=False)
    assert shown.frames.shape[1:3] == ((96, 64) if matrix[0] == 0 else (64, 96))
    # Turned back, the pictures show their numbers.
    back = [turned(frame, (matrix[0], matrix[2], 0, matrix[1], matrix[3])) for frame in shown.frames]
    assert [number_in(frame) for frame in back] == list(shown.plan.indices)
    if matrix == (0, 1, -1, 0):  # a telephone's portrait: a quarter turn clockwise
        assert stored.rotation == -90
        assert np.array_equal(back[0], np.rot90(shown.frames[0]))
    assert not caplog.records
    # Side data of a kind that PyAV does not know, as spatial video has it, makes it refuse all of it.
    turn = orientation_of(stored)
    assert turn.rotation == stored.rotation % 360
    sealed = Sealed(stored.rotation)
    assert orientation_of(sealed, turn) == turn
    if np.linalg.det(np.reshape(matrix, (2, 2))) > 0:  # not mirrored
        assert orientation_of(sealed) == turn


class Sealed:
    """A frame that does not give its side data."""

    def __init__(self, rotation: int) -> None:
        self.rotation = rotation

    @property
    def side_data(self):
        raise ValueError("29 is not a valid Type")


def test_an_orientation_inside_the_stream_is_found(tmp_path):
    plain_file = write(tmp_path / "plain.mp4")
    path = tmp_path / "inside.mp4"
    with av.open(str(plain_file)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        bits = BitStreamFilterContext("h264_metadata=display_orientation=insert:rotate=90", source.streams.video[0])
        for packet in itertools.chain(*(bits.filter(packet) for packet in source.demux(video=0) if packet.size)):
            packet.stream = stream
            target.mux(packet)
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    matrix = stored_matrix(frames[0])  # said once, it holds for the whole file
    assert matrix
    pictures = [turned(frame.to_ndarray(format="rgb24"), matrix) for frame in frames]
    check(path, numbered=False, counted=True, clips=[{}, EVERY], loop=(pictures, plain(path)[1]))
    assert ClipReader(SAMPLING).read(str(path)).frames.shape[1:3] == (96, 64)


@pytest.mark.parametrize("name", ["wide.mp4", "wide.mkv", "wide.avi", "wide.ts"])
def test_pixels_that_are_not_square_are_evened_out(tmp_path, name):
    shown = check(write(tmp_path / name, "mpeg4", aspect=Fraction(2, 1)), numbered=False, stamped=False)
    assert shown.frames.shape[1:3] == (64, 192)
    shown = check(write(tmp_path / f"tall {name}", "mpeg4", aspect=Fraction(1, 2)), numbered=False, stamped=False)
    assert shown.frames.shape[1:3] == (64, 64)  # 48 pixels wide, in whole tokens


VARIABLE = {
    "gaps.mp4": dict(stamps=RANDOM_GAPS, options=B_FRAMES),
    "gaps.mkv": dict(stamps=RANDOM_GAPS, options=B_FRAMES),
    "hevc.mp4": dict(stamps=RANDOM_GAPS, codec="libx265"),
    "dropped.mp4": dict(stamps=[40 * i for i in range(48) if i % 7 and i not in range(20, 37)][:24]),
    "vp9.webm": dict(stamps=RANDOM_GAPS + 700, codec="libvpx-vp9", options={"deadline": "realtime"}),
}


@pytest.mark.parametrize("name", VARIABLE)
def test_frames_of_a_variable_rate_are_the_nearest_ones_at_their_true_times(tmp_path, name):
    path = write(tmp_path / name, **VARIABLE[name])
    stamps = np.array(VARIABLE[name]["stamps"]) / 1000
    n = len(stamps)
    path_loop = plain(path)
    assert np.allclose(np.array(path_loop[1]) - path_loop[1][0], stamps - stamps[0], atol=0.002)
    check(path, constant=False, loop=path_loop)
    plan = ClipReader(SAMPLING).plan(Clip(str(path), fps=1000.0, max_frames=6)).plan
    positions = np.linspace(0, n - 1, 6).round().astype(int)
    wanted = stamps[0] + (stamps[-1] - stamps[0]) * positions / (n - 1)
    assert list(plan.indices) == [int(np.abs(stamps - at).argmin()) for at in wanted]
    plan = ClipReader(SAMPLING.override(timestamps="index")).plan(Clip(str(path), fps=1000.0, max_frames=6)).plan
    with av.open(str(path)) as container:
        header = container.streams.video[0].average_rate
    assert list(plan.indices) == positions.tolist()
    assert plan.times == tuple(index / float(header) for index in plan.indices)


@pytest.mark.parametrize(
    "name", ["h264.mp4", "h264.mkv", "vp8.webm", "hevc.ts", "mjpeg.avi", "fragments.mp4", "late.mp4"]
)
@pytest.mark.parametrize("own", [{}, EVERY, {"start": 0.5, "end": 1.5}], ids=["some", "every", "span"])
def test_at_a_constant_rate_both_kinds_of_times_are_alike(tmp_path, name, own):
    path = write(tmp_path / name, **FILES[name])
    plans = [
        ClipReader(SAMPLING.override(timestamps=kind)).plan(Clip(str(path), **own)).plan for kind in ("pts", "index")
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("cut", [3, 5, 12, 17])
def test_what_an_edit_list_cuts_off_is_not_shown(tmp_path, cut):
    path = write(tmp_path / "cut.mp4", options=B_FRAMES)
    data = path.read_bytes()
    at = box(data, b"moov", b"edts", b"elst") + 12
    (begin,) = struct.unpack_from(">i", data, at)
    replaced(path, at, struct.pack(">i", begin + cut * 1024))  # 12288 units a second
    shown = check(path, first=cut, clips=[{}, EVERY], threads=(1, 2, 3))
    assert max(shown.plan.indices) == 23 - cut


def test_metadata_in_another_encoding_does_no_harm(tmp_path):
    path = tmp_path / "titled.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "a title"
        stream = container.add_stream("mjpeg", rate=12)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuvj420p"
        for i in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
        container.mux(stream.encode())
    check(replaced(path, path.read_bytes().index(b"a title"), b"\xe9 title"))


def test_a_decoder_that_hangs_is_left_behind(tmp_path, monkeypatch):
    path = write(tmp_path / "hangs.mp4")
    release = threading.Event()
    monkeypatch.setattr(clip_module, "decode_frames", lambda *a, **k: release.wait(30))
    begin = time.monotonic()
    with pytest.raises(ClipError, match=r"hangs\.mp4: the decoder hangs: .* video_timeout, 0\.5 s"):
        ClipReader(SAMPLING, timeout=0.5).read(str(path))
    assert time.monotonic() - begin < 3
    release.set()


@pytest.mark.parametrize("name", ["slow.mp4", "slow.avi"])
def test_a_slow_decoder_is_stopped_between_packets(tmp_path, monkeypatch, name):
    path = write(tmp_path / name, options={"bf": "0", "g": "100"})
    real_open = decode.open_container

    class Slow(Spy):
        def demux(self, stream):
            for packet in self.real.demux(stream):
                time.sleep(0.1)
                yield packet

        def __getattr__(self, attribute):
            return getattr(self.real, attribute)

    def open_slowly(source, timeout=None, packets_only=False):
        container = real_open(source, timeout, packets_only)
        return container if packets_only else Slow(container, {})

    monkeypatch.setattr(decode, "open_container", open_slowly)
    begin = time.monotonic()
    with pytest.raises(ClipError, match=r"slow\....: decoding took more than video_timeout, 0\.5 s"):
        ClipReader(SAMPLING, timeout=0.5, threads=1).read(str(path))
    assert time.monotonic() - begin < 1.4


@pytest.mark.parametrize("timeout", [None, 1])
def test_a_pipe_is_refused_at_once(tmp_path, timeout):
    os.mkfifo(tmp_path / "pipe.mp4")
    begin = time.monotonic()
    with pytest.raises(ClipError, match=r"pipe\.mp4: is not a regular file"):
        ClipReader(SAMPLING, timeout=timeout).read(str(tmp_path / "pipe.mp4"))
    assert time.monotonic() - begin < 0.5


def test_a_clip_that_is_replaced_is_shown_as_it_is_now(tmp_path, caplog, monkeypatch):
    path = tmp_path / "replaced.mp4"
    reader = ClipReader(SAMPLING)

    def numbers(first, frames=24):
        """Numbers shown; the plan agrees with them."""
        shown = reader.read(str(path))
        found = [number_in(frame) for frame in shown.frames]
        assert found == [first + index for index in shown.plan.indices]
        assert shown.plan == reader.plan(str(path)).plan
        assert max(shown.plan.indices) == frames - 1
        return found

    write(path)
    numbers(0)
    assert not caplog.records
    write(path, first=100)
    numbers(100)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} has been replaced since it was last read; it is read again."
    ]
    before = reader.plan(str(path)).plan
    write(path, first=200, frames=36)
    numbers(200, 36)
    assert reader.plan(str(path)).plan != before

    real = clip_module.decode_frames
    others = iter([(300, 30), (400, 18)])

    def replace_meanwhile(*arguments):
        frames = real(*arguments)
        for first, count in itertools.islice(others, 1):
            write(path, first=first, frames=count)
        return frames

    monkeypatch.setattr(clip_module, "decode_frames", replace_meanwhile)
    numbers(400, 18)
    others = ((500 + i, 12 + i) for i in range(100))
    with pytest.raises(ClipError, match=r"replaced\.mp4: changes while it is read"):
        reader.read(str(path))


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {clip}\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
    "<Representation><BaseURL>{clip}</BaseURL></Representation></AdaptationSet></Period></MPD>",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", ["m3u8", "mp4", "sdp", "ts"])
def test_lists_of_other_files_are_refused(tmp_path, monkeypatch, kind, suffix):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "clip.ts")
    path = tmp_path / f"list.{suffix}"
    path.write_text(PLAYLISTS[kind].format(clip="clip.ts"))
    for source in (str(path), path.read_bytes()):
        with pytest.raises(ClipError, match="is not a video"):
            ClipReader(SAMPLING).plan(source)


@pytest.mark.parametrize("name", ["concat:a|b.mp4", "http:x.mp4", "%03d.mp4", "-i.mp4", "pipe:0", "a#b?c.mp4"])
def test_odd_names_are_those_of_plain_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClipError, match="cannot be opened"):
        ClipReader(SAMPLING).plan(name)
    write(tmp_path / "clip.mp4").rename(tmp_path / name)
    check(name)


def test_an_image_sequence_is_no_file(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for i in range(3):
        Image.fromarray(picture(i)).save(f"{i:03}.png")
    with pytest.raises(ClipError, match="cannot be opened"):
        ClipReader(SAMPLING).plan("%03d.png")
    (tmp_path / "%03d.png").write_bytes((tmp_path / "000.png").read_bytes())
    with pytest.raises(ClipError, match="is not a video"):
        ClipReader(SAMPLING).plan("%03d.png")


def huge_matroska(data):
    at = data.index(b"\xb0\x82\x02\x00\xba\x82\x01\x00")  # PixelWidth 512, PixelHeight 256
    return data[:at] + b"\xb0\x82\xff\xff\xba\x82\xff\xff" + data[at + 8 :]


def huge_vp8(data):
    at = data.index(b"\x9d\x01\x2a") + 3  # the key frame's start code, then 14 bits of width and of height
    return data[:at] + struct.pack("<HH", 16383, 16383) + data[at + 4 :]


def huge_jpeg(data):
    for at in [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xc0"]:
        data = data[: at + 5] + struct.pack(">HH", 65500, 65500) + data[at + 9 :]
    return data


@pytest.mark.parametrize(
    "name, made, change",
    [
        ("vp8.webm", dict(codec="libvpx", options={"deadline": "realtime"}), huge_vp8),
        ("vp8.mkv", dict(codec="libvpx", options={"deadline": "realtime"}), huge_vp8),
        ("jpeg.avi", dict(codec="mjpeg", pix_fmt="yuvj420p"), huge_jpeg),
        ("jpeg.mkv", dict(codec="mjpeg", pix_fmt="yuvj420p"), huge_jpeg),
        ("ffv1.mkv", dict(codec="ffv1", size=(256, 512), frames=2), huge_matroska),
    ],
)
def test_frames_that_are_huge_are_refused_before_memory_is_taken(tmp_path, name, made, change):
    path = write(tmp_path / name, **made)
    path.write_bytes(change(path.read_bytes()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ClipError, match=rf"{name}: "):
        ClipReader(SAMPLING).read(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; a frame would take 400 MB


def png(width, height):
    """A PNG of one colour, which packs well."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [
        png(60000, 60000),
        png(9000, 9000),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n",
        b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\n%%EOF\n",
        b"",
    ],
    ids=["bomb", "large", "eps", "pdf", "empty"],
)
def test_pictures_that_are_none_or_huge_are_refused(tmp_path, content):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    for read in (open_picture, picture_size):
        with pytest.raises(ClipError, match=r"picture\.png: is not a picture that can be read"):
            read(str(path))
    with pytest.raises(ClipError, match=r"picture\.png"):
        ClipReader(SAMPLING).plan([str(path)] * 2)
    if content[16:] == png(9000, 9000)[16:]:
        with pytest.raises(ClipError, match="9000 x 9000; at most"):
            picture_size(str(path))


@pytest.mark.parametrize("name", ["mpeg2.ts", "h264.ts", "mpeg4.avi", "h264.flv"])
def test_containers_whose_index_leads_elsewhere_are_not_counted(tmp_path, monkeypatch, name):
    """With B frames, a seek in these lands beside the key frame; parts are skipped all the same."""
    codec = {"mpeg2": "mpeg2video", "h264": "libx264", "mpeg4": "mpeg4"}[name.split(".")[0]]
    path = write(tmp_path / name, codec=codec, options={"bf": "2", "g": "12"}, frames=400, rate=25)
    monkeypatch.setattr(clip_module, "count_by_decoding", lambda *args: pytest.fail("counted"))
    check(path, clips=[{"start": start, "end": 15.5, "max_frames": 4} for start in (2.0, 9.0, 14.0)])
