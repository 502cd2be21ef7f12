"""Clips from files and pictures: what is planned is what is read."""

import io

import numpy as np
import pytest
from conftest import decode_all, real_clips, write_clip
from llamafactory_video.data.conversation import Clip
from llamafactory_video.video.clip import plan_clip, read_clip
from llamafactory_video.video.probe import ClipError, open_picture, picture_size, probe
from llamafactory_video.video.sampling import Sampling
from PIL import Image

# 64 x 96 pixels of 12 frames fit as they are, so frames read can be compared with frames decoded.
AS_STORED = Sampling("qwen_finetune", fps=4, min_frames=2, max_frames=8, min_pixels=4096, max_pixels=10**6)


def test_the_frames_read_are_those_planned(clip):
    plan = plan_clip(str(clip), AS_STORED)
    assert plan.indices == (0, 2, 3, 5, 6, 8, 9, 11)
    assert np.array_equal(read_clip(str(clip), plan), decode_all(clip)[list(plan.indices)])


def test_a_span_is_as_if_cut_out(clip):
    plan = plan_clip(Clip(str(clip), start=0.5, end=1.5), AS_STORED)
    assert plan.indices == (3, 5, 6, 8)
    assert plan.times[0] == 0.0
    assert np.allclose(plan.times, (np.array(plan.indices) - 3) / 6)
    with pytest.raises(ClipError, match="clip.mp4 from 5 s to …: no frame lies between .* the last one is at 1.83 s"):
        plan_clip(Clip(str(clip), start=5.0), AS_STORED)


def test_a_clips_own_settings_override_the_recipes(clip):
    plan = plan_clip(Clip(str(clip), fps=1.0, max_pixels=8192), AS_STORED)
    assert len(plan.indices) == 2
    assert 2 * plan.height * plan.width <= 8192


def test_pictures_are_a_clip(clip, tmp_path):
    frames = decode_all(clip)
    paths = []
    for i, frame in enumerate(frames):
        paths.append(str(tmp_path / f"{i:02}.png"))
        Image.fromarray(frame).save(paths[-1])
    file_plan = plan_clip(str(clip), AS_STORED)
    plan = plan_clip(Clip(frames=tuple(paths), frame_rate=6.0), AS_STORED)
    assert plan == file_plan
    assert np.array_equal(read_clip(Clip(frames=tuple(paths)), plan), read_clip(str(clip), file_plan))
    times = tuple(1 + i / 6 for i in range(12))
    assert np.allclose(plan_clip(Clip(frames=tuple(paths), times=times), AS_STORED).times, plan.times)
    assert len(plan_clip(paths, AS_STORED).indices) == 8  # no rate: sampled already, and max_frames still holds
    Image.new("RGB", (64, 64)).save(paths[3])
    with pytest.raises(ClipError, match="frames differ in size"):
        plan_clip(Clip(frames=tuple(paths)), AS_STORED)


@pytest.mark.parametrize("source", ["bytes", "file object", "stream"])
def test_uploads_are_read_like_files(clip, source):
    data = clip.read_bytes()

    class Stream:
        read = io.BytesIO(data).read

    video = {"bytes": data, "file object": io.BytesIO(data), "stream": Stream()}[source]
    if source == "stream":
        from llamafactory_video.video.clip import buffer_stream

        video = buffer_stream(video)
    plan = plan_clip(video, AS_STORED)
    assert plan == plan_clip(str(clip), AS_STORED)
    assert np.array_equal(read_clip(video, plan), read_clip(str(clip), plan))


def test_odd_counts_repeat_the_last_frame(tmp_path):
    clip = write_clip(tmp_path / "odd.mp4", frames=5, fps=5)
    plan = plan_clip(str(clip), AS_STORED.override(fps=5.0))
    assert plan.indices == (0, 1, 2, 3, 4, 4)
    frames = read_clip(str(clip), plan)
    assert np.array_equal(frames[4], frames[5])
    one = write_clip(tmp_path / "one.mp4", frames=1)
    assert plan_clip(str(one), AS_STORED).indices == (0, 0)


def test_clips_that_cannot_be_read_are_named(clip, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ClipError, match="text.mp4: is not a video"):
        plan_clip(str(tmp_path / "text.mp4"), AS_STORED)
    with pytest.raises(ClipError, match="gone.mp4: cannot be opened"):
        plan_clip(str(tmp_path / "gone.mp4"), AS_STORED)
    small = write_clip(tmp_path / "small.mp4", size=(16, 64))
    with pytest.raises(ClipError, match="small.mp4: frames are 64 x 16; Qwen3-VL needs at least 32"):
        plan_clip(str(small), AS_STORED)
    plan = plan_clip(str(clip), AS_STORED)
    with pytest.raises(ClipError, match=r"one\.mp4: yields 1 frames where its packets promise at least 12"):
        read_clip(str(write_clip(tmp_path / "one.mp4", frames=1)), plan)
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
        plan_clip(str(tmp_path / "list.mp4"), AS_STORED)


@pytest.mark.parametrize("path", real_clips() or [None], ids=lambda path: path.name if path else "none")
def test_packets_count_what_decoding_yields(path):
    if path is None:
        pytest.skip("the real clips (../shared/videos) are not present")
    assert probe(str(path)).num_frames == len(decode_all(path))
