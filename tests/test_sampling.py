"""Frames, times, sizes and pixels against transformers' processors, LLaMA-Factory's and qwen-vl-utils' own code."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from llamafactory.data import mm_plugin
from llamafactory_video.video.decode import resize_frame
from llamafactory_video.video.plan import count_frames, plan_frames, sample_positions, select_span
from llamafactory_video.video.sampling import ClipInfo, Sampling, SamplingError
from llamafactory_video.video.sizes import image_size, smart_resize
from PIL import Image
from qwen_vl_utils import vision_process
from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as image_smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as video_smart_resize
from transformers.video_utils import VideoMetadata

RATES = [1, 3, 10, 15, 23.976, 24, 25, 29.97, 30, 50, 59.94, 60, 120]

clips = st.builds(
    lambda frames, fps, height, width: ClipInfo(frames, fps, frames / fps, height, width),
    st.integers(1, 4000),
    st.sampled_from(RATES) | st.floats(0.5, 240),
    st.integers(32, 2200),
    st.integers(32, 4000),
)


@examples(1500)
@given(
    clips, st.floats(0.1, 30), st.integers(1, 64), st.integers(1, 768), st.integers(4096, 10**6), st.integers(1, 64)
)
def test_qwen_finetune_equals_transformers(info, fps, min_frames, more, min_pixels, factor):
    assume(max(info.height, info.width) <= 200 * min(info.height, info.width))
    max_frames, max_pixels = min_frames + more, min_pixels * factor
    processor = Qwen3VLVideoProcessor(fps=fps, min_frames=min_frames, max_frames=max_frames)
    metadata = VideoMetadata(total_num_frames=info.num_frames, fps=info.fps, duration=info.duration)
    indices = processor.sample_frames(metadata)
    height, width = video_smart_resize(
        len(indices), info.height, info.width, min_pixels=min_pixels, max_pixels=max_pixels
    )
    times = Qwen3VLProcessor._calculate_timestamps(None, indices.tolist(), info.fps)

    sampling = Sampling("qwen_finetune", fps, min_frames, max_frames, min_pixels, max_pixels)
    plan = plan_frames(info, sampling)
    padded = [*indices.tolist(), *indices[-1:].tolist() * (len(indices) % 2)]
    assert list(plan.indices) == padded
    assert (plan.height, plan.width) == (height, width)
    assert plan.grid == (len(padded) // 2, height // 16, width // 16)
    assert plan.timestamps == times
    assert plan.num_tokens == math.prod(plan.grid) // 4


class Path(str):
    """Stands for a file's path where a reference opens one; carries what its reader is to find."""

    __slots__ = ("frames", "info", "stream")

    def __new__(cls, **carried):
        path = super().__new__(cls, "clip.mp4")
        for name, value in carried.items():
            setattr(path, name, value)
        return path


@examples(1500)
@given(
    clips, st.floats(0.1, 30), st.integers(1, 256), st.integers(256, 10**6), st.integers(1, 64), st.floats(0.5, 1.5)
)
def test_llamafactory_equals_its_own_code(info, fps, maxlen, min_pixels, factor, header_lie):
    max_pixels = min_pixels * factor
    info = replace(info, duration=info.duration * header_lie)
    stream = SimpleNamespace(
        type="video",
        frames=info.num_frames,
        duration=info.duration,
        time_base=1,
        average_rate=info.fps,
        width=info.width,
        height=info.height,
    )
    container = SimpleNamespace(streams=[stream], close=lambda: None)
    processor = SimpleNamespace(
        image_processor=Qwen3VLVideoProcessor,
        video_processor=SimpleNamespace(
            patch_size=16, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 4096, "longest_edge": 25165824}
        ),
        video_fps=fps,
        video_maxlen=maxlen,
        video_min_pixels=min_pixels,
        video_max_pixels=max_pixels,
    )
    stock = mm_plugin.get_mm_plugin("qwen3_vl", image_token="<|image_pad|>", video_token="<|video_pad|>")
    sampling = Sampling("llamafactory", fps, 1, maxlen, min_pixels, max_pixels)
    with mock.patch("av.open", lambda path, mode: container):
        try:
            metadata = stock._get_video_token_metadata(["clip.mp4"], processor)
        except ValueError:
            with pytest.raises(SamplingError, match="at least 32|200 times"):
                plan_frames(info, sampling)
            return
    indices = stock._get_video_sample_indices(stream, fps, maxlen).tolist()
    width, height = stock._get_qwen_video_size_after_regularization(info.width, info.height, max_pixels, min_pixels)
    grid = metadata["video_grid_thw"][0]

    plan = plan_frames(info, sampling)
    assert list(plan.indices) == indices + indices[-1:] * (len(indices) % 2)
    assert plan.pre_size == (height, width)
    assert list(plan.grid) == grid.tolist()
    assert (plan.height, plan.width) == (16 * grid[1], 16 * grid[2])
    assert plan.num_tokens == grid.prod() // 4
    assert plan.timestamps == Qwen3VLProcessor._calculate_timestamps(None, indices, info.fps)
    shown = metadata["video_metadata"][0]
    assert plan.timestamps == pytest.approx(
        Qwen3VLProcessor._calculate_timestamps(None, shown.frames_indices, shown.fps), rel=1e-12, abs=1e-12
    )


class Reader:
    """decord.VideoReader of a `Path` to an `info`; its frames have no channels, so no memory, where none are given."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return self.path.info.num_frames

    def get_avg_fps(self):
        return self.path.info.fps

    def get_batch(self, indices):
        if self.path.frames is not None:
            return SimpleNamespace(asnumpy=lambda: self.path.frames[indices])
        return SimpleNamespace(asnumpy=lambda: no_pixels(self.path.info.height, self.path.info.width, len(indices)))


class Picture(Image.Image):
    """A PIL image of a size alone."""

    def __init__(self, height, width):
        super().__init__()
        self._size, self._mode = (width, height), "RGB"

    def convert(self, mode):
        return self

    def resize(self, size):
        if 0 in size:
            raise ValueError("height and width must be > 0")  # as PIL says
        return Picture(*size[::-1])

    @property
    def __array_interface__(self):
        return no_pixels(self.height, self.width).__array_interface__


def no_pixels(height, width, *frames):
    return np.empty((*frames, height, width, 0), np.uint8)


@pytest.fixture(scope="module")
def utils():
    """qwen-vl-utils as it is, with a decord that reads a `Path`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "decord", SimpleNamespace(VideoReader=Reader))
        patch.setattr(vision_process, "get_video_reader_backend", lambda: "decord")
        # The package reads again with torchvision where decord fails; here it shall fail again.
        patch.setitem(vision_process.VIDEO_READER_BACKENDS, "torchvision", vision_process._read_video_decord)
        patch.setattr(vision_process, "MODEL_SEQ_LEN", 128000)
        patch.setattr(vision_process.logger, "disabled", True)
        yield vision_process


def fetch_sizes(utils, element):
    """What fetch_video would show: indices, rate, size before and after its last resize; None where it refuses."""
    sizes = []

    def resize(video, size, **_):
        if 0 in size:
            raise ValueError("Input and output sizes should be greater than 0")  # torch refuses them too
        sizes.extend([tuple(video.shape[-2:]), tuple(size)])
        return video

    try:
        with mock.patch.object(utils.transforms.functional, "resize", resize):
            _, metadata = utils.fetch_video(element, image_patch_size=16, return_video_metadata=True)
    except (ValueError, AssertionError):
        return None
    return metadata["frames_indices"], metadata["fps"], *sizes


def check_utils_plan(expected, info, given, start=None, end=None):
    """Compares the plan, or the refusal, with what `fetch_sizes` returned, and returns the plan."""
    if expected is None:
        with pytest.raises(SamplingError):
            plan_frames(info, utils_sampling(**given), start, end)
        return None
    indices, rate, before, (height, width) = expected
    plan = plan_frames(info, utils_sampling(**given), start, end)
    if info.pictures:
        assert list(plan.indices) == [min(i, info.num_frames - 1) for i in indices]
    else:
        assert list(plan.indices) == indices
    assert plan.pre_size == (before if info.pictures else None)
    assert (plan.height, plan.width) == (height, width)
    assert plan.grid == (len(indices) // 2, height // 16, width // 16)
    assert plan.num_tokens == len(indices) // 2 * height * width // 32**2
    assert plan.timestamps == Qwen3VLProcessor._calculate_timestamps(None, indices, rate)
    return plan


def utils_sampling(**given):
    return Sampling("qwen_vl_utils", **{"min_pixels": None, "max_pixels": None, **given})


def scales(low, high):
    """Whole numbers, as many small ones as large ones."""
    return st.floats(math.log(low), math.log(high)).map(lambda x: min(max(round(math.exp(x)), low), high))


def optional(**strategies):
    return st.fixed_dictionaries({}, optional=strategies)


def joined(*strategies):
    """One dict of the settings of all."""
    return st.tuples(*strategies).map(lambda found: {k: v for part in found for k, v in part.items()})


# Without contradictions (least above most): Sampling refuses them by name, qwen-vl-utils not always.
pixel_bounds = optional(min_pixels=scales(1, 10**6), max_pixels=scales(10**5, 10**7) | scales(1, 10**7)).filter(
    lambda s: s.get("min_pixels", 1) <= s.get("max_pixels", 10**7)
)
fixed_sizes = st.just({}) | st.fixed_dictionaries(
    {"resized_height": scales(1, 8000), "resized_width": scales(1, 8000)}
)
utils_pixels = joined(pixel_bounds, optional(total_pixels=scales(1, 10**9)), st.just({}) | fixed_sizes)
utils_counts = optional(nframes=st.integers(2, 16) | st.integers(1, 1000)) | optional(
    fps=st.floats(0.05, 30) | st.sampled_from([0.5, 1, 2, 4]),
    min_frames=st.integers(1, 64),
    max_frames=st.integers(1, 1000),
).filter(lambda s: s.get("min_frames", 4) <= s.get("max_frames", 768))
sides = st.integers(100, 2200) | scales(1, 4500)
any_clips = st.builds(
    lambda frames, fps, height, width: ClipInfo(frames, fps, frames / fps, height, width),
    st.integers(1, 12) | st.integers(12, 4000) | st.integers(12, 500000),  # in long clips float32 shows
    st.sampled_from(RATES) | st.floats(0.5, 240),
    sides,
    sides,
)
# Where a span begins and ends: None, a part of the clip's length, or one of its frames (from the end if negative).
starts = st.none() | st.floats(-0.1, 0.6) | st.integers(0, 50)
ends = st.none() | st.floats(0.4, 1.2) | st.integers(-50, -1)


def seconds(moment, info):
    if moment is None:
        return None
    return moment * info.duration if isinstance(moment, float) else moment % (info.num_frames + 1) / info.fps


@examples(3000)
@given(any_clips, utils_counts, utils_pixels, starts, ends)
def test_qwen_vl_utils_equals_the_package(utils, info, counts, pixels, start, end):
    start, end = seconds(start, info), seconds(end, info)
    span = {"video_start": start, "video_end": end}
    span = {key: value for key, value in span.items() if value is not None}
    path = Path(info=info, frames=None)
    expected = fetch_sizes(utils, {"video": path, **counts, **pixels, **span})
    check_utils_plan(expected, info, {**counts, **pixels}, start, end)


@examples(1500)
@given(
    st.integers(1, 12),
    sides,
    sides,
    utils_pixels,
    optional(sample_fps=st.floats(0.1, 30), raw_fps=st.floats(0.5, 120)),
)
def test_qwen_vl_utils_pictures_equal_the_package(utils, count, height, width, pixels, rates):
    pictures = [Picture(height, width)] * count
    rate = rates.get("raw_fps", rates.get("sample_fps", 2.0))
    info = ClipInfo(count, rate, count / rate, height, width, pictures=True)
    check_utils_plan(fetch_sizes(utils, {"video": pictures, **pixels, **rates}), info, pixels)


@examples(1500)
@given(sides, sides, pixel_bounds)
def test_qwen_vl_utils_image_size_equals_the_package(utils, height, width, bounds):
    full = (bounds.get("min_pixels", 4 * 32**2), bounds.get("max_pixels", 16384 * 32**2))
    sampling = utils_sampling(image_bounds=full)
    try:
        expected = utils.fetch_image({"image": Picture(height, width), **bounds}, image_patch_size=16)
    except (ValueError, AssertionError):
        with pytest.raises(SamplingError):
            image_size(height, width, sampling)
        return
    assert image_size(height, width, sampling) == (expected.height, expected.width)


def noise(frames, height, width):
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


def resized(frames, plan):
    """Our pixels, as (T, 3, plan.height, plan.width)."""
    shown = np.stack([resize_frame(frames[i], plan) for i in plan.indices])
    return torch.from_numpy(shown).permute(0, 3, 1, 2)


SIZES = [(90, 160), (160, 90), (101, 333), (64, 96), (20, 50), (480, 640), (33, 700)]


LOOSE, TIGHT, LARGE = {}, {"min_pixels": 1000, "max_pixels": 60000}, {"min_pixels": 300000}


@pytest.mark.parametrize(
    ("pictures", "pixels"),
    [
        *((False, pixels) for pixels in (LOOSE, TIGHT, LARGE)),
        *((True, pixels) for pixels in (LOOSE, TIGHT, LARGE)),  # in the last two, PIL alone resizes
    ],
)
def test_qwen_vl_utils_pixels(utils, pictures, pixels):
    differences = {}
    for height, width in SIZES:
        frames = noise(5, height, width)
        info = ClipInfo(5, 2.0, 2.5, height, width, pictures=pictures)
        video = [Image.fromarray(frame) for frame in frames] if pictures else Path(info=info, frames=frames)
        expected = utils.fetch_video({"video": video, **pixels}, image_patch_size=16)
        ours = resized(frames, plan_frames(info, utils_sampling(**pixels))).float()
        differences[height, width] = (ours - expected).abs().max().item()
    assert not any(differences.values()), differences


@pytest.mark.parametrize("bounds", [(4096, 25165824), (4096, 100000), (800000, 25165824)])
@pytest.mark.parametrize(("height", "width"), [size for size in SIZES if min(size) >= 32])
def test_qwen_finetune_pixels(height, width, bounds):
    frames = noise(5, height, width)
    processor = Qwen3VLVideoProcessor(size={"shortest_edge": bounds[0], "longest_edge": bounds[1]})
    info = ClipInfo(5, 2.0, 2.5, height, width)
    plan = plan_frames(info, Sampling(min_pixels=bounds[0], max_pixels=bounds[1]))
    metadata = VideoMetadata(total_num_frames=5, fps=2.0, duration=2.5)
    raw = torch.from_numpy(frames).permute(0, 3, 1, 2)
    expected = processor(videos=[raw], video_metadata=[metadata], return_tensors="pt")
    ours = processor(videos=[resized(frames, plan)], do_resize=False, do_sample_frames=False, return_tensors="pt")
    assert expected["video_grid_thw"].tolist() == ours["video_grid_thw"].tolist() == [list(plan.grid)]
    assert torch.equal(expected["pixel_values_videos"], ours["pixel_values_videos"])


def test_the_worked_example(utils):
    """worked-example.md of ../shared/reference: 15 s of 720p60 at 2 frames/s, in the meaning of qwen-vl-utils."""
    info = ClipInfo(900, 60.0, 15.0, 720, 1280)
    given = {"fps": 2.0, "total_pixels": 20480 * 32 * 32, "min_pixels": 64 * 32 * 32, "max_frames": 2048}
    plan = check_utils_plan(fetch_sizes(utils, {"video": Path(info=info, frames=None), **given}), info, given)
    assert len(plan.indices) == 30
    assert (*plan.indices[:5], plan.indices[-1]) == (0, 31, 62, 93, 124, 899)
    assert (plan.height, plan.width, plan.grid) == (640, 1152, (15, 40, 72))
    assert (plan.num_tokens, plan.tokens_per_timestamp) == (10800, 720)
    assert [f"{time:.1f}" for time in plan.timestamps[:3]] == ["0.3", "1.3", "2.3"]


dialects = st.sampled_from([Sampling("qwen_finetune"), Sampling("llamafactory"), utils_sampling()])
wishes = st.tuples(dialects, st.floats(0.1, 30), st.integers(1, 16), st.integers(16, 768)).map(
    lambda wish: replace(wish[0], fps=wish[1], min_frames=wish[2], max_frames=wish[3])
)


@examples(500)
@given(st.integers(2, 2000), st.sampled_from(RATES), wishes)
def test_timestamps_are_alike_where_the_rate_is_constant(n, fps, sampling):
    info = ClipInfo(n, fps, n / fps, 360, 640)
    timed = replace(info, times=tuple(i / fps for i in range(n)))
    index = replace(sampling, timestamps="index")
    plan = plan_frames(info, sampling)
    assert plan_frames(timed, sampling) == plan_frames(timed, index) == plan_frames(info, index) == plan


@examples(1000)
@given(st.integers(2, 400), st.integers(0, 10**6), st.floats(0.5, 60), wishes, starts, st.floats(5, 60))
def test_variable_rates(n, seed, fps, sampling, start, header_fps):
    """`pts` shows the frames nearest to the wanted times, at their real times, or where frames are rare the one on the
    screen at the wanted time; `index` as if the rate were constant."""
    times = np.random.default_rng(seed).exponential(1 / fps, n).cumsum()
    times = tuple((times - times[0]).tolist())
    info = ClipInfo(n, fps, n / fps, 360, 640, times, header_fps)
    start = seconds(start, info)
    try:
        span = select_span(info, sampling, start, None)
        assume(len(span) > 1)
        plan = plan_frames(info, sampling, start)
    except SamplingError:
        assume(False)
    utils = sampling.dialect == "qwen_vl_utils"
    begin = times[span[0]] if utils else max(times[span[0]], start or 0.0)
    length = times[span[-1]] - begin
    assume(length > 0)
    rate = round((len(span) - 1) / length, 6)
    count = count_frames(len(span), rate, len(span) / rate, sampling)
    positions = np.array(sample_positions(len(span), count, sampling, span.start))
    wanted = begin + (positions - span.start) / (len(span) - 1) * length
    assert len(plan.indices) == count + count % 2
    assert plan.indices[count:] == plan.indices[-1:] * (count % 2)
    assert {*plan.indices} <= {*span}
    assert list(plan.times) == sorted(plan.times)
    on_screen = np.array([max(time, begin) for time in times[span.start : span.stop]])
    origin = times[0] if utils else begin
    for index, told, at in zip(plan.indices, plan.times, wanted, strict=False):
        following = int(np.searchsorted(on_screen, at - 1e-9, side="left"))
        gap = on_screen[following] - on_screen[max(following - 1, 0)]
        if gap > max(2 * length / max(count - 1, 1), 10 * length / (len(span) - 1)) * (1 + 1e-9):
            shown = following if on_screen[following] <= at + 1e-9 else following - 1
            assert index == span.start + shown and told == pytest.approx(at - origin, abs=1e-9)
        else:
            assert told == on_screen[index - span.start] - origin
            assert abs(times[index] - at) == pytest.approx(
                np.abs(np.array(times)[span.start : span.stop] - at).min(), abs=1e-9
            )

    indexed = plan_frames(info, replace(sampling, timestamps="index"))
    assert indexed == plan_frames(ClipInfo(n, header_fps, n / fps, 360, 640), sampling)
    assert indexed.times == tuple(i / header_fps for i in indexed.indices)


@examples(1500)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1024, 10**6), st.integers(1, 32))
def test_image_size_equals_transformers(height, width, min_pixels, factor):
    assume(max(height, width) <= 200 * min(height, width))
    bounds = {"min_pixels": min_pixels, "max_pixels": min_pixels * factor}
    assert smart_resize(height, width, 32, **bounds) == image_smart_resize(height, width, 32, **bounds)


def test_the_official_numbers():
    """official-recipe: 15 s of 720p30 at 4 frames/s, 16 to 32 frames, 401408 to 1003520 pixels for the whole clip."""
    plan = plan_frames(ClipInfo(450, 30.0, 15.0, 720, 1280), Sampling("qwen_finetune", 4.0, 16, 32, 401408, 1003520))
    assert len(plan.indices) == 32
    assert 32 * plan.height * plan.width <= 1003520
    assert plan.num_tokens <= 490


@examples(500)
@given(st.integers(2, 2000), st.integers(1, 2000), wishes, st.sampled_from(["pts", "index"]))
def test_a_span_is_sampled_as_if_cut_out(n, skipped, sampling, timestamps):
    assume(sampling.dialect != "qwen_vl_utils")  # it spreads frames over the whole file's numbers
    sampling = replace(sampling, timestamps=timestamps)
    cut = plan_frames(ClipInfo(n, 8.0, n / 8, 360, 640), sampling)
    plan = plan_frames(ClipInfo(n + skipped, 8.0, (n + skipped) / 8, 360, 640), sampling, skipped / 8)
    assert plan == replace(cut, indices=tuple(i + skipped for i in cut.indices))


def test_the_bounds_of_a_span():
    info, sampling = ClipInfo(100, 10.0, 10.0, 64, 64), Sampling()
    assert select_span(info, sampling, 2.0, 5.0) == range(20, 50)
    assert select_span(info, sampling, None, 0.05) == range(0, 1)
    with pytest.raises(SamplingError, match="no frame lies between start and end; the last one is at 9.90 s"):
        select_span(info, sampling, 12.0, None)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"fps": 0}, "video_fps is 0"),
        ({"min_frames": 9, "max_frames": 8}, "video_min_frames is 9 and video_max_frames 8"),
        ({"min_pixels": 5000, "max_pixels": 4096}, "video_min_pixels is 5000"),
    ],
)
def test_contradicting_settings_are_named(settings_, message):
    with pytest.raises(SamplingError, match=message):
        Sampling(**settings_)


def test_frames_that_cannot_be_shown():
    with pytest.raises(SamplingError, match="30 x 40; Qwen3-VL needs at least 32"):
        plan_frames(ClipInfo(10, 5.0, 2.0, 40, 30), Sampling())
    with pytest.raises(SamplingError, match="no video frames"):
        plan_frames(ClipInfo(0, 5.0, 0.0, 64, 64), Sampling())
    assert np.isclose(plan_frames(ClipInfo(1, 5.0, 0.2, 64, 64), Sampling()).timestamps, [0.0]).all()


STANDING = ClipInfo(90, 3.875, 23.2, 64, 96, tuple([i / 30 for i in range(60)] + [22 + i / 30 for i in range(30)]))


@pytest.mark.parametrize(
    ("span", "frames", "times"),
    [
        ((10, 15), [59, 59], [0, 0]),  # nothing new begins in it
        ((10, 22.01), [59, 59, 60, 60], None),
        ((22.98, None), [89, 89], [0, 0]),
        ((1.0, 1.1), [30, 31, 32, 32], [0, 1 / 30, 2 / 30, 2 / 30]),
    ],
)
def test_a_picture_is_on_the_screen_until_the_next(span, frames, times):
    plan = plan_frames(STANDING, Sampling(fps=30.0, min_frames=1, max_frames=4), *span)
    if times is None:
        assert set(plan.indices) == {59, 60} and plan.times[0] == 0 and plan.times[-1] == pytest.approx(12)
    else:
        assert (list(plan.indices), list(plan.times)) == (frames, pytest.approx(times))


def test_where_frames_are_rare_the_model_is_told_what_stands():
    """A recorder wrote nothing from 2 s to 22 s: at each time in between, the picture of 2 s."""
    plan = plan_frames(STANDING, Sampling(fps=2.0, min_frames=4, max_frames=16))
    for index, at in zip(plan.indices, plan.times, strict=True):
        assert index == max(i for i, time in enumerate(STANDING.times) if time <= at + 1 / 60)
    gaps = np.diff(plan.times)
    assert gaps.max() < 1.1 * 22.97 / 15 and gaps.min() > 0.5


def test_the_end_of_the_last_frame_is_the_end_of_the_clip():
    info, sampling = ClipInfo(60, 20.0, 3.0, 64, 64), Sampling(min_frames=1)
    assert plan_frames(info, sampling, 2.96, 3.0).indices == (59, 59)
    assert plan_frames(info, sampling, 2.01, 2.04).indices == (40, 40)
    with pytest.raises(SamplingError, match=r"no frame lies between start and end; the last one is at 2\.95 s"):
        plan_frames(info, sampling, 3.0)
