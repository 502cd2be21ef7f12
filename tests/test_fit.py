"""Records over the cutoff: found before training, made to fit by a stated rule, and never cut."""

import json
import math
from dataclasses import replace

import pytest
from conftest import examples, write_clip
from hypothesis import assume, example, given
from hypothesis import strategies as st
from llamafactory_video.host.rows import LAYOUT
from llamafactory_video.media import Clip
from llamafactory_video.model.processor import apply_to_processor
from llamafactory_video.prompt.encoder import Encoder
from llamafactory_video.prompt.lengths import check_samples
from llamafactory_video.prompt.pixels import vision_inputs
from llamafactory_video.records.clips import decode_clip
from llamafactory_video.records.parse import parse_record
from llamafactory_video.records.report import DatasetError
from llamafactory_video.records.table import Records, load_conversations
from llamafactory_video.video.fit import SHRINK_STAGES, most_tokens, shrink
from llamafactory_video.video.plan import plan_frames
from llamafactory_video.video.reader import ClipReader
from llamafactory_video.video.sampling import ClipInfo, Sampling, SamplingError

infos = st.builds(
    lambda frames, fps, height, width: ClipInfo(frames, fps, frames / fps, height, width),
    st.integers(1, 4000),
    st.floats(1, 120),
    st.integers(32, 3000),
    st.integers(32, 3000),
)
samplings = st.one_of(
    st.builds(
        lambda fps, least, most, low, factor: Sampling("qwen_finetune", fps, least, least + most, low, low * factor),
        st.floats(0.1, 30), st.integers(1, 32), st.integers(0, 200), st.integers(4096, 10**6), st.integers(1, 30),
    ),
    st.builds(
        lambda fps, most, low, factor: Sampling("llamafactory", fps, 1, most, low, low * factor),
        st.floats(0.1, 30), st.integers(1, 200), st.integers(256, 10**6), st.integers(1, 30),
    ),
    st.builds(
        lambda fps, most, low, total: Sampling(
            "qwen_vl_utils", fps, 2, most, min_pixels=low, max_pixels=None, total_pixels=total
        ),
        st.floats(0.1, 30), st.integers(2, 200), st.integers(4096, 10**6) | st.none(), st.integers(10**4, 10**8),
    ),
)  # fmt: skip


def tokens(plan):
    """Visual tokens, and what the times beside them take in Qwen's tokenizer: a token for each character or word."""
    times = sum(len(f"<{time:.1f}") + 4 for time in plan.timestamps)
    return plan.num_tokens + times


@examples(2000)
@given(infos, samplings)
def test_no_clip_takes_more_than_most_tokens(info, sampling):
    try:
        plan = plan_frames(info, sampling)
    except SamplingError:
        assume(False)
    assert tokens(plan) <= most_tokens(sampling)


@examples(1000)
@example(
    ClipInfo(34, 1.0, 34.0, 259, 2037),
    Sampling("qwen_vl_utils", 1.0, 2, 34, min_pixels=4096, max_pixels=None, total_pixels=516762),
    0,
    0.0,
)
@given(infos, samplings, st.integers(0, SHRINK_STAGES - 1), st.floats(0, 1))
def test_shrinking_follows_its_rule(info, sampling, stage, share):
    """Pixels first, then frames, neither below the recipe's least; below them only in the last two stages."""
    try:
        plan = plan_frames(info, sampling)
    except SamplingError:
        assume(False)
    given_ = {key: value for key, value in shrink(sampling, plan, stage, share).items() if value is not None}
    try:
        smaller = plan_frames(info, sampling.override(**given_))
        last = plan_frames(info, sampling.override(**shrink(sampling, plan, SHRINK_STAGES - 1, 0.0)))
    except SamplingError:
        assert sampling.dialect != "qwen_finetune"  # the others round small frames down to nothing
        assume(False)
    frames, least_frames = len(plan.indices), min(sampling.min_frames, len(plan.indices))
    assert len(smaller.indices) <= frames
    if stage == 0:
        assert smaller.indices == plan.indices
    if stage == 1:
        assert len(smaller.indices) >= least_frames
    if stage < 2:
        assert given_.get("min_pixels", 0) <= (sampling.min_pixels or math.inf)
    assert len(last.indices) == min(2, info.num_frames + info.num_frames % 2)
    assert last.num_tokens <= max(plan.num_tokens, 500)  # rounding can add to what is a few tokens anyway


@pytest.fixture
def encoder(processor):
    keys = {
        "video_fps": 4.0,
        "video_min_frames": 4,
        "video_maxlen": 8,
        "video_min_pixels": 8192,
        "video_max_pixels": 65536,
    }
    return Encoder(
        processor.tokenizer, processor, ClipReader(apply_to_processor("qwen_finetune", keys, processor).clips), 10**6
    )


def row(*videos, answer="推进到二塔"):
    record = {
        "video": list(videos),
        "conversations": [
            {"from": "human", "value": "<video>" * len(videos) + "描述这个视频"},
            {"from": "gpt", "value": answer},
        ],
    }
    conversation, problems = parse_record(record, lambda path: path)
    assert not problems
    return replace(conversation, source="data.json, record 3")


def test_shrink_makes_records_fit_and_tells_it(encoder, clip, tmp_path):
    other = write_clip(tmp_path / "other.mp4", frames=30, fps=10, size=(128, 160))
    whole = encoder.encode(row(str(clip), str(other)))
    assert not whole.change
    assert not encoder.visual_tokens(whole.labels)
    text = len(whole.ids) - encoder.visual_tokens(whole.ids)
    encoder.shrink = True
    least = None
    for cutoff in range(len(whole.ids), text - 60, -3):
        encoder.cutoff_len = cutoff
        try:
            sample = encoder.encode(row(str(clip), str(other)))
        except DatasetError as error:
            least = str(error)
            break
        assert len(sample.ids) <= cutoff
        assert bool(sample.change) == (len(whole.ids) > cutoff)
        # What was said is whole, and the clips carry what they were shrunk to: pixels and tokens agree.
        said = [label for label in sample.labels if label >= 0]
        assert said == [label for label in whole.labels if label >= 0]
    assert cutoff < 0.8 * len(whole.ids)
    assert "even its smallest clips do not fit; raise cutoff_len" in least

    encoder.cutoff_len = (len(whole.ids) + cutoff) // 2
    sample = encoder.encode(row(str(clip), str(other)))
    assert sample.change.startswith(f"data.json, record 3: {len(whole.ids)} tokens, ")
    assert str(other) in sample.change
    loaded, decoded = encoder.load(row(str(clip), str(other)))
    assert loaded == sample and [clip.plan for clip in decoded] == [clip.plan for clip in sample.clips]
    grids = vision_inputs([], decoded, encoder.processor, encoder.reader.sampling)["video_grid_thw"]
    assert grids.prod(1).sum() // 4 == encoder.visual_tokens(sample.ids)


def test_without_shrink_the_error_says_what_would_fit(encoder, clip):
    whole = encoder.encode(row(str(clip)))
    encoder.cutoff_len = len(whole.ids) - 1
    with pytest.raises(
        DatasetError, match=r"record 3: \d+ tokens, \d+ of them visual, are more than cutoff_len"
    ) as told:
        encoder.encode(row(str(clip)))
    settings_ = str(told.value).split("or set ")[1].split(f" for {clip}")[0]
    given_ = {name: int(value) for name, value in (part.split() for part in settings_.split(", "))}
    assert len(encoder.encode(row({"path": str(clip), **given_})).ids) <= encoder.cutoff_len


def test_long_texts_are_never_cut(encoder, clip):
    encoder.shrink, encoder.cutoff_len = True, 60
    with pytest.raises(DatasetError, match="even its smallest clips do not fit; raise cutoff_len to"):
        encoder.encode(row(str(clip), answer="很长" * 100))
    with pytest.raises(DatasetError, match="cutoff_len 60; raise cutoff_len to .* or shorten its text"):
        encoder.encode(row(answer="很长" * 100))


def test_records_that_cannot_be_too_long_are_not_measured(encoder, tmp_path):
    missing = str(tmp_path / "missing.mp4")  # no clip is looked at
    encoder.cutoff_len = most_tokens(encoder.reader.sampling) + 200
    assert not encoder.may_be_too_long(row(missing))
    assert encoder.may_be_too_long(row(missing, missing))
    assert encoder.may_be_too_long(row({"path": missing, "max_pixels": 10**7}))
    assert encoder.may_be_too_long(row(missing, answer="长" * 200))


@pytest.mark.parametrize("workers", [1, 2])
def test_all_records_are_seen_before_training(encoder, clip, tmp_path, workers):
    long = write_clip(tmp_path / "long.mp4", frames=40, fps=10, size=(128, 160))
    turns = [{"from": "human", "value": "<video>描述"}, {"from": "gpt", "value": "答"}]
    large = {"path": str(long), "max_pixels": 131072}
    records = [{"video": large if i in (7, 80) else str(clip), "conversations": turns} for i in range(90)]
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    keys = {"cache_dir": str(tmp_path / "cache"), "progress": False}
    data = Records(load_conversations(tmp_path / "data.json", str(tmp_path), LAYOUT, **keys), LAYOUT)
    encoder.cutoff_len = len(encoder.encode(data[0]).ids)
    said = []
    with pytest.raises(DatasetError, match="training: 2 of 90 records cannot be used") as told:
        check_samples(data, encoder, "training", workers, tmp_path / "out", said.append)
    assert "record 8 " in str(told.value)
    assert "record 81 " in str(told.value)
    assert len((tmp_path / "out" / "too_long_records_training.txt").read_text(encoding="utf-8").splitlines()) == 2
    encoder.shrink = True
    check_samples(data, encoder, "training", workers, tmp_path / "out", said.append)
    assert "clips of 2 of 90 records are made smaller" in said[0]
    report = (tmp_path / "out" / "shrunk_records_training.txt").read_text(encoding="utf-8")
    assert "max_pixels" in report
    assert len(report.splitlines()) == 2


def test_clips_carry_their_settings(clip):
    video = Clip(str(clip), max_pixels=5000, nframes=4)
    assert decode_clip(video.encode()) == video
