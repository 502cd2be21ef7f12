"""Frames, times and sizes against transformers' Qwen3-VL processors and LLaMA-Factory's own code."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from llamafactory_video.video.sampling import (
    ClipInfo,
    Sampling,
    SamplingError,
    plan_frames,
    select_span,
    smart_resize,
)
from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as image_smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as video_smart_resize
from transformers.video_utils import VideoMetadata

clips = st.builds(
    lambda frames, fps, height, width: ClipInfo(frames, fps, frames / fps, height, width),
    st.integers(1, 4000),
    st.sampled_from([1, 3, 10, 15, 23.976, 24, 25, 29.97, 30, 50, 59.94, 60, 120]) | st.floats(0.5, 240),
    st.integers(32, 2200),
    st.integers(32, 4000),
)


@settings(max_examples=1500, deadline=None)
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


@settings(max_examples=500, deadline=None)
@given(clips, st.floats(0.1, 30), st.integers(1, 256), st.integers(256, 10**6), st.integers(1, 64))
def test_llamafactory_equals_its_own_code(info, fps, maxlen, min_pixels, factor):
    from llamafactory.data.mm_plugin import get_mm_plugin

    max_pixels = min_pixels * factor
    stock = get_mm_plugin("qwen3_vl", image_token="<|image_pad|>", video_token="<|video_pad|>")
    stream = SimpleNamespace(frames=info.num_frames, duration=info.duration, time_base=1)
    indices = stock._get_video_sample_indices(stream, fps, maxlen).tolist()
    indices += indices[-1:] * (len(indices) % 2)
    width, height = stock._get_qwen_video_size_after_regularization(info.width, info.height, max_pixels, min_pixels)
    sampling = Sampling("llamafactory", fps, 1, maxlen, min_pixels, max_pixels)
    if min(height, width) < 32 or max(height, width) > 200 * min(height, width):
        with pytest.raises(SamplingError, match="at least 32|200 times"):
            plan_frames(info, sampling)
        return
    size = stock._get_qwen_video_resize(len(indices), height, width, 16, 2, 2, 4096, 25165824)
    plan = plan_frames(info, sampling)
    assert list(plan.indices) == indices
    assert plan.pre_size == (height, width)
    assert (plan.height, plan.width) == size


@settings(max_examples=500, deadline=None)
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


def test_span_is_as_if_cut_out():
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
