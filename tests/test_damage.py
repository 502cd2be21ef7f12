"""Damaged files: each frame that is shown is whole, and is the one of the time that is told.

What a frame should be is known without decoding damage: its picture is that of the undamaged file, and carries its
number. Files are those of tests/clips, since what a damaged byte does depends on what an encoder wrote.
"""

import re
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import THOROUGH
from drawing import CLIPS, KEPT, number_in
from llamafactory_video.media import Clip
from llamafactory_video.video import codecs, damage
from llamafactory_video.video.codecs import FrameNumbers
from llamafactory_video.video.damage import whole_frames
from llamafactory_video.video.probe import ClipError
from llamafactory_video.video.reader import ClipReader
from llamafactory_video.video.sampling import Sampling

SAMPLING = Sampling("qwen_finetune", fps=1000, min_frames=1, max_frames=1000, min_pixels=4096, max_pixels=10**8)
FRAMES, RATE = 24, 12
H264 = [name for name in KEPT if "h264" in name or name == "fragments.mp4"]


def packets(path) -> list[av.Packet]:
    """Of the video, in decoding order; their bytes, positions and time stamps stay after the file is closed."""
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def pictures(path) -> list[np.ndarray]:
    """Of an undamaged file."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def show(path, threads: int = 2):
    """Frames and their times in frames; None if the file is refused by name."""
    try:
        shown = ClipReader(SAMPLING, timeout=20, threads=threads).read(Clip(str(path)))
    except ClipError as error:
        assert str(path) in str(error)
        return None
    return shown.frames, [round(at * RATE, 3) for at in shown.plan.times]


def wrong_ones(shown, whole: list[np.ndarray]) -> list[tuple[int, float]]:
    """Number and time of the frames that are not the picture of their time; times count from the first one shown."""
    frames, times = shown
    first = number_in(frames[0])
    found = []
    for frame, at in zip(frames, times, strict=True):
        number = first + round(at)
        if not (number < len(whole) and abs(at - round(at)) < 0.05 and np.array_equal(frame, whole[number])):
            found.append((number_in(frame), at))
    return found


def numbers(path) -> set[int]:
    """Of all frames that can be shown; by their place in the file, since wanted times pass over some beside a gap."""
    shown = ClipReader(SAMPLING.override(timestamps="index")).read(Clip(str(path)))
    assert len(set(shown.plan.indices)) == shown.plan.indices[-1] + 1
    return {int(number_in(frame)) for frame in shown.frames}


def damaged_packet(data: bytes, packet: av.Packet, kind: str) -> bytes | None:
    """A file with one packet's bytes zeroed, its second half zeroed, or its head turned round; None if they lie apart."""
    content = bytes(packet)
    at, half = data.find(content), len(content) // 2
    if at < 0:
        return None
    changed = {
        "zeroed": bytes(len(content)),
        "cut": content[:half] + bytes(len(content) - half),
        "head": bytes(byte ^ 255 for byte in content[:8]) + content[8:],
    }[kind]
    return data[:at] + changed + data[at + len(content) :]


def lost_with(path: Path, at: int) -> set[int]:
    """Numbers of the frames between a damaged packet and the next key frame, itself included, in decoding order."""
    all_ = packets(path)
    order = {p.pts: number for number, p in enumerate(sorted(all_, key=lambda p: p.pts))}
    end = next((i for i in range(at + 1, len(all_)) if all_[i].is_keyframe), len(all_))
    key = max(i for i in range(at + 1) if all_[i].is_keyframe)
    if all_[at].pts < all_[key].pts:  # before its key frame on the screen: no reference of what comes after it there
        return {order[p.pts] for p in all_[at:end] if p.pts < all_[key].pts}
    # Those that come after the next key frame in the file and before it on the screen need both sides.
    leading = [p for p in all_[end + 1 :] if end < len(all_) and p.pts < all_[end].pts]
    return {order[p.pts] for p in [*all_[at:end], *leading]}


@pytest.mark.parametrize("kind", ["zeroed", "cut", "head"])
@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "fragments.mp4"])
def test_a_damaged_packet_costs_what_is_decoded_from_it_and_nothing_else(tmp_path, caplog, name, kind):
    data, whole, path = (CLIPS / name).read_bytes(), pictures(CLIPS / name), tmp_path / name
    told = 0
    for at, packet in enumerate(packets(CLIPS / name)):
        path.write_bytes(damaged_packet(data, packet, kind))
        caplog.clear()
        shown = show(path, threads=1 + at % 3)
        assert not wrong_ones(shown, whole), at
        # Frames that would come out of the decoder together with an error are lost with it. In open groups (the MKV) the
        # next group may have one more error, where it would let go of a frame that is missing.
        left = set(range(FRAMES)) - lost_with(CLIPS / name, at)
        assert numbers(path) <= left and len(left - numbers(path)) <= (6 if name == "h264.mkv" else 2), at
        line = caplog.records[0].getMessage()
        left, total, lost = map(int, re.search(r"damaged: (\d+) of (\d+) frames .* (\d+) are damaged", line).groups())
        assert (left, total, lost) == (len(numbers(path)), FRAMES, FRAMES - left)
        told += 1
    assert told == FRAMES


@pytest.mark.parametrize("name", ["h264.mp4", "fragments.mp4"])
def test_a_packet_that_was_never_written_is_missed(tmp_path, name):
    """As a recorder leaves it that loses some: FFmpeg puts another picture in its place and says nothing."""
    whole, path = pictures(CLIPS / name), tmp_path / "lost.mp4"
    for missing in range(FRAMES):
        with av.open(str(CLIPS / name)) as source, av.open(str(path), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for number, packet in enumerate(p for p in source.demux(video=0) if p.size):
                if number != missing:
                    packet.stream = stream
                    target.mux(packet)
        shown = show(path, threads=1 + missing % 2)
        assert not wrong_ones(shown, whole), missing
        assert numbers(path) >= set(range(FRAMES)) - lost_with(CLIPS / name, missing), missing


@pytest.mark.parametrize("at", range(3, 130, 9))
def test_packets_of_a_transport_stream_that_got_lost_are_missed(tmp_path, caplog, at):
    data, whole, path = (CLIPS / "h264.ts").read_bytes(), pictures(CLIPS / "h264.ts"), tmp_path / "h264.ts"
    path.write_bytes(data[: 188 * at] + data[188 * (at + 1) :])
    shown = show(path)
    assert not wrong_ones(shown, whole)
    assert len(numbers(path)) >= FRAMES - 12
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "ends in the middle" not in said or at > 125


def damaged_anywhere(data: bytes, seed: int) -> bytes:
    """One to three places of 64 bytes each, random and zero."""
    random, damaged = np.random.default_rng(seed), bytearray(data)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(0 if seed % 2 else len(data) // 3, len(data) - 64))
        damaged[at : at + 64] = random.bytes(int(random.integers(1, 64)))[:64].ljust(64, b"\0")
    return bytes(damaged)


# The most frames of 100 shown that are not the picture of their time, of damage that the decoder does not report.
UNREPORTED = {**dict.fromkeys(H264, 5), "hevc.mkv": 25, "vp8.webm": 25, "mpeg4.avi": 35}


@pytest.mark.parametrize("name", KEPT)
def test_random_damage_is_shown_where_a_decoder_does_not_report_it_and_nowhere_else(tmp_path, caplog, name):
    data, path = (CLIPS / name).read_bytes(), tmp_path / name
    shown_frames = wrong = refused = 0
    for seed in range(200 if THOROUGH else 30):
        path.write_bytes(damaged_anywhere(data, seed))
        shown = show(path, threads=1 + seed % 3)
        if shown is None:
            refused += 1
            continue
        shown_frames += len(shown[0])
        first = number_in(shown[0][0])
        wrong += sum(number_in(frame) != first + round(at) for frame, at in zip(*shown, strict=True))
    print(f"{name}: refused {refused}, shown {shown_frames}, wrong {wrong}")
    assert shown_frames > 100
    if THOROUGH or name in H264:
        assert wrong <= shown_frames * UNREPORTED[name] / 100
    assert all("Traceback" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("name", ["h264.mp4", "fragments.mp4", "h264.ts", "vp8.webm", "mpeg4.avi"])
def test_files_cut_short_show_what_is_left(tmp_path, caplog, name):
    data, whole, path = (CLIPS / name).read_bytes(), pictures(CLIPS / name), tmp_path / name
    outcomes = []
    for share in (0.02, 0.2, 0.5, 0.7, 0.9, 0.99):
        path.write_bytes(data[: int(len(data) * share)])
        caplog.clear()
        shown = show(path)
        outcomes.append(shown is not None)
        if shown is None:
            continue
        assert not wrong_ones(shown, whole) or name == "vp8.webm"  # whose last frame may be cut without a word
        assert number_in(shown[0][0]) == 0
        if len(numbers(path)) < FRAMES and name == "h264.mp4":
            said = [record.getMessage() for record in caplog.records]
            assert any(str(path) in line and "frames" in line for line in said)
    assert not outcomes[0] and outcomes[-1]


def test_an_mp4_without_its_index_is_named(tmp_path):
    path = tmp_path / "headless.mp4"
    data = (CLIPS / "h264.mp4").read_bytes()
    begin, end = data.index(b"moov") - 4, data.index(b"mdat") - 4
    path.write_bytes(data[:begin] + data[end:])
    assert show(path) is None


def test_fewer_frames_than_min_frames_are_refused(tmp_path):
    path = tmp_path / "short.mp4"
    path.write_bytes((CLIPS / "h264.mp4").read_bytes()[:-4000])
    with pytest.raises(ClipError, match=r"short\.mp4: .*fewer than video_min_frames, 24; replace it"):
        ClipReader(SAMPLING.override(min_frames=24, max_frames=24)).read(str(path))


# --- The arithmetic --------------------------------------------------------------------------------------------------


def test_whole_frames_are_those_with_nothing_damaged_before_them():
    # In the file: I0 P2 B1 P4 B3 I6 B5 P7, each with its place on the screen; B5 refers to P4 and I6.
    stamps = [0, 2, 1, 4, 3, 6, 5, 7]
    keys = (0, 5)

    def whole(damaged, lost=()):
        shown = [(position, position in keys) for position in range(8) if position not in lost]
        return [stamps[shown[number][0]] for number in whole_frames(shown, damaged, stamps)]

    assert whole([]) == stamps
    assert whole([4]) == [0, 2, 1, 4, 6, 7]
    assert whole([3]) == [0, 2, 1, 6, 7]
    assert whole([0]) == [6, 7]
    assert whole([5], lost=[5]) == [0, 2, 1, 4, 3]
    assert whole([6]) == [0, 2, 1, 4, 3, 6, 7]  # nothing refers to a B frame from before the key frame
    assert whole([7]) == [0, 2, 1, 4, 3, 6, 5]
    assert whole([], lost=[0]) == stamps[1:]  # a stream that begins without a key frame


@pytest.mark.parametrize(
    ("seconds", "kept"),
    [
        ([], []),
        ([1.0], [0]),
        ([0.0, 1.0, 2.0], [0, 1, 2]),
        ([0.0, 9.0, 1.0, 2.0], [0, 2, 3]),
        ([5.0, 0.0, 1.0, 1.0, 2.0], [1, 3, 4]),
        ([0.0, 1.0, 0.5, 3.0, 2.0, 4.0], [0, 2, 4, 5]),
    ],
)
def test_time_stamps_out_of_line_are_left_out(seconds, kept):
    assert damage._increasing(seconds) == kept


@pytest.mark.parametrize("name", H264)
def test_frame_numbers_have_gaps_where_frames_are_missing_that_others_need(name):
    with av.open(str(CLIPS / name)) as container:
        stream = container.streams.video[0]
        all_ = [packet for packet in container.demux(stream) if packet.size]
        follow = FrameNumbers(stream)
        assert not any(follow.gap(packet) for packet in all_)
        # One that no other refers to (a B frame of these files) leaves none, a P frame does.
        refers = codecs.reference_test(stream)
        for missing in range(1, len(all_) - 1):
            if all_[missing].is_keyframe or all_[missing + 1].is_keyframe:
                continue
            follow = FrameNumbers(stream)
            found = [follow.gap(packet) for packet in all_[:missing] + all_[missing + 1 :]]
            assert any(found) == refers(all_[missing]), missing
