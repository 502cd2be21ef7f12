"""Clips from files and pictures: what is planned is what is read."""

import io

import numpy as np
import pytest
from conftest import decode_all, real_clips, write_clip
from llamafactory_video.media import Clip
from llamafactory_video.video.pictures import open_picture, picture_size
from llamafactory_video.video.probe import ClipError, probe
from llamafactory_video.video.reader import ClipReader
from llamafactory_video.video.sampling import Sampling
from PIL import Image

# 64 x 96 pixels of 12 frames fit as they are, so frames read can be compared with frames decoded.
AS_STORED = Sampling("qwen_finetune", fps=4, min_frames=2, max_frames=8, min_pixels=4096, max_pixels=10**6)
READER = ClipReader(AS_STORED)


def test_the_frames_read_are_those_planned(clip):
    plan = READER.plan(str(clip)).plan
    assert plan.indices == (0, 2, 3, 5, 6, 8, 9, 11)
    assert np.array_equal(READER.read(str(clip)).frames, decode_all(clip)[list(plan.indices)])


def test_a_span_is_as_if_cut_out(clip):
    plan = READER.plan(Clip(str(clip), start=0.5, end=1.5)).plan
    assert plan.indices == (3, 5, 6, 8)
    assert plan.times[0] == 0.0
    assert np.allclose(plan.times, (np.array(plan.indices) - 3) / 6)
    with pytest.raises(ClipError, match="clip.mp4 from 5 s to …: no frame lies between .* the last one is at 1.83 s"):
        READER.plan(Clip(str(clip), start=5.0))


def test_a_clips_own_settings_override_the_recipes(clip):
    plan = READER.plan(Clip(str(clip), fps=1.0, max_pixels=8192)).plan
    assert len(plan.indices) == 2
    assert 2 * plan.height * plan.width <= 8192


def test_pictures_are_a_clip(clip, tmp_path):
    frames = decode_all(clip)
    paths = []
    for i, frame in enumerate(frames):
        paths.append(str(tmp_path / f"{i:02}.png"))
        Image.fromarray(frame).save(paths[-1])
    file_plan = READER.plan(str(clip)).plan
    plan = READER.plan(Clip(frames=tuple(paths), frame_rate=6.0)).plan
    assert plan == file_plan
    assert np.array_equal(READER.read(Clip(frames=tuple(paths))).frames, READER.read(str(clip)).frames)
    times = tuple(1 + i / 6 for i in range(12))
    assert np.allclose(READER.plan(Clip(frames=tuple(paths), times=times)).plan.times, plan.times)
    assert len(READER.plan(paths).plan.indices) == 8  # no rate: sampled already, and max_frames still holds
    Image.new("RGB", (64, 64)).save(paths[3])
    with pytest.raises(ClipError, match="frames differ in size"):
        READER.plan(Clip(frames=tuple(paths)))


@pytest.mark.parametrize("source", ["bytes", "file object", "stream"])
def test_uploads_are_read_like_files(clip, source):
    data = clip.read_bytes()

    class Stream:
        def __init__(self):
            self.read = io.BytesIO(data).read

    made = {"bytes": lambda: data, "file object": lambda: io.BytesIO(data), "stream": Stream}[source]
    shown = READER.read(made())
    assert shown.plan == READER.plan(str(clip)).plan
    assert np.array_equal(shown.frames, READER.read(str(clip)).frames)


def test_odd_counts_repeat_the_last_frame(tmp_path):
    clip = write_clip(tmp_path / "odd.mp4", frames=5, fps=5)
    shown = ClipReader(AS_STORED.override(fps=5.0)).read(str(clip))
    assert shown.plan.indices == (0, 1, 2, 3, 4, 4)
    frames = shown.frames
    assert np.array_equal(frames[4], frames[5])
    one = write_clip(tmp_path / "one.mp4", frames=1)
    assert READER.plan(str(one)).plan.indices == (0, 0)


def test_clips_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ClipError, match="text.mp4: is not a video"):
        READER.plan(str(tmp_path / "text.mp4"))
    with pytest.raises(ClipError, match="gone.mp4: cannot be opened"):
        READER.plan(str(tmp_path / "gone.mp4"))
    small = write_clip(tmp_path / "small.mp4", size=(16, 64))
    with pytest.raises(ClipError, match="small.mp4: frames are 64 x 16; Qwen3-VL needs at least 32"):
        READER.plan(str(small))
    (tmp_path / "picture.png").write_text("no picture")
    with pytest.raises(ClipError, match="picture.png: is not a picture"):
        picture_size(str(tmp_path / "picture.png"))


def test_pictures_stand_upright(tmp_path):
    picture = Image.new("RGB", (60, 40), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert picture_size(str(tmp_path / "turned.jpg")) == (60, 40)
    assert open_picture(str(tmp_path / "turned.jpg")).size == (40, 60)
    assert open_picture({"bytes": (tmp_path / "turned.jpg").read_bytes()}).mode == "RGB"


def test_a_playlist_opens_no_other_file(clip, tmp_path):
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {clip}\n")
    with pytest.raises(ClipError, match="is not a video"):
        READER.plan(str(tmp_path / "list.mp4"))


@pytest.mark.parametrize("path", real_clips() or [None], ids=lambda path: path.name if path else "none")
def test_packets_count_what_decoding_yields(path):
    if path is None:
        pytest.skip("the real clips (../shared/videos) are not present")
    assert probe(str(path))[0].info.num_frames == len(decode_all(path))
