"""The demo's parts: the small model, the clips, the report."""

import json
import random
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from llamafactory_video.demo import game, tiny_model
from llamafactory_video.demo.__main__ import main
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

QWEN3VL = Path(__file__).parents[2] / "shared" / "qwen3vl"


@pytest.fixture(scope="module")
def processor():
    return tiny_model.build_processor()


@pytest.fixture(scope="module")
def official():
    if not QWEN3VL.is_dir():
        pytest.skip("the official Qwen3-VL processor is not beside the project")
    return AutoProcessor.from_pretrained(QWEN3VL)


def text(role, *texts):
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


VIDEO, IMAGE = {"type": "video", "video": "a.mp4"}, {"type": "image", "image": "a.png"}
LOOK = {"role": "user", "content": [IMAGE, VIDEO, {"type": "text", "text": " 看\n"}, VIDEO, {"image_url": "b.png"}]}
CALL = {"name": "seek", "arguments": {"秒": 1.5, "back": True}}
TOOLS = [{"type": "function", "function": {"name": "seek", "description": "跳转", "parameters": {"type": "object"}}}]
CONVERSATIONS = {
    "strings": [{"role": "system", "content": "你是助手"}, {"role": "user", "content": " hi\n"}],
    "no system": [text("user", "a", "b"), text("assistant", "c", "d"), text("user", "e")],
    "empty system": [{"role": "system", "content": ""}, text("user", "a")],
    "items": [text("system", "x", "y"), LOOK, {"role": "assistant", "content": "<think>\n</think>"}, LOOK],
    "late system": [text("user", "a"), text("system", "ignored")],
    "tools": [
        text("system", "x"),
        LOOK,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}, CALL]},
        {"role": "tool", "content": "ok"},
        {"role": "tool", "content": [VIDEO, IMAGE, {"type": "text", "text": "done"}]},
        {"role": "assistant", "content": "先看", "tool_calls": [{"name": "seek", "arguments": '{"a": 1}'}]},
        {"role": "tool", "content": "ok"},
        {"role": "assistant", "content": "好"},
        {"role": "tool", "content": "last"},
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}, {"add_vision_id": True}])
def test_chat_template_renders_as_the_official_one(processor, official, name, tools, options):
    render = [p.apply_chat_template(CONVERSATIONS[name], tools=tools, **options) for p in (processor, official)]
    assert render[0] == render[1]


# The small model.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint smaller than the demo's."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model.save_tiny_model(folder, hidden_size=32, layers=2, heads=2)
    return folder


def test_tokenizer_has_qwens_added_tokens_in_order(processor, official):
    ours, theirs = (sorted(p.tokenizer.added_tokens_decoder.items()) for p in (processor, official))
    assert [(t.content, t.special) for _, t in ours] == [(t.content, t.special) for _, t in theirs]
    assert [i for i, _ in ours] == list(range(ours[0][0], ours[0][0] + len(ours)))
    assert processor.tokenizer.special_tokens_map == official.tokenizer.special_tokens_map


def test_tokenizer_knows_the_games_words_and_loses_no_text(processor):
    tokenizer = processor.tokenizer
    scene = random.Random(0).choice(game.all_scenes())
    answer = json.dumps(scene.answer(), ensure_ascii=False)
    assert tokenizer.convert_ids_to_tokens(tokenizer(answer).input_ids) == tokenizer.tokenize(answer)
    assert len(tokenizer(answer).input_ids) == 40
    for text in (answer, game.QUESTION, "Any text, 任何文字 🎬\n<0.3 seconds><|video_pad|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_is_the_same_every_time(processor, folder):
    text = json.dumps(game.all_scenes()[77].answer(), ensure_ascii=False)
    again = [tiny_model.build_tokenizer(), AutoTokenizer.from_pretrained(folder)]
    assert [t.get_vocab() for t in again] == [processor.tokenizer.get_vocab()] * 2
    assert [t(text).input_ids for t in again] == [processor.tokenizer(text).input_ids] * 2


def test_saved_model_loads_as_the_real_one_does(folder, processor):
    loaded = AutoProcessor.from_pretrained(folder)
    assert isinstance(loaded, Qwen3VLProcessor)
    assert isinstance(loaded.image_processor, Qwen2VLImageProcessor)
    assert isinstance(loaded.video_processor, Qwen3VLVideoProcessor)
    assert loaded.chat_template == loaded.tokenizer.chat_template == processor.chat_template
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(model, Qwen3VLForConditionalGeneration)
    assert model.dtype == torch.float32
    assert model.config.video_token_id == loaded.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert model.generation_config.eos_token_id[0] == loaded.tokenizer.eos_token_id


def test_processor_has_the_official_settings(processor, official):
    for part in ("image_processor", "video_processor"):
        ours, theirs = getattr(processor, part), getattr(official, part)
        for name in ("size", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std"):
            assert getattr(ours, name) == getattr(theirs, name)


def test_weights_come_from_the_seed_alone(processor):
    config = tiny_model.build_config(processor.tokenizer, hidden_size=32, layers=1, heads=2)
    state = torch.random.get_rng_state()
    first, second, other = (tiny_model.build_model(config, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(state, torch.random.get_rng_state())


def test_model_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tiny_model, "build_model", killed)
        tiny_model.save_tiny_model(tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()
    tiny_model.save_tiny_model(tmp_path / "tiny", hidden_size=32, layers=1, heads=2)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


# The clips.


def test_scenes_and_their_answers_are_all_different():
    scenes = game.all_scenes()
    assert len(scenes) == len(set(scenes)) == 11520
    assert len({json.dumps(scene.answer()) for scene in scenes}) == len(scenes)


def test_answer_tells_what_the_scene_is():
    scene = game.Scene("红色", "圆形", "左上", True, "途中吃掉", "蓝色", "方形")
    assert scene.answer() == {
        "video_description": "红色圆形从左上出发，先向右，再向下，途中吃掉蓝色方形。",
        "tags": ["红色圆形", "左上", "向右向下", "途中吃掉", "蓝色方形"],
    }


def centre(frame, colour):
    """Where a colour is on a frame, as x, y in points; None where it is not."""
    distance = np.abs(frame.astype(int) - game.COLOURS[colour]).max(axis=-1)
    y, x = np.nonzero(distance < 40)
    return np.array([x.mean(), y.mean()]) if len(x) > 20 else None


@pytest.mark.parametrize("number", random.Random(1).sample(range(11520), 24))
def test_clip_file_shows_what_its_answer_says(tmp_path, number):
    scene = game.all_scenes()[number]
    path = tmp_path / "clip.mp4"
    game.write_clip(path, number, scene)
    with av.open(path) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate, stream.frames) == ("h264", game.FPS, game.FRAMES)
    with av.open(str(path)) as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert frames.shape == (game.FRAMES, game.SIZE, game.SIZE, 3)

    start, middle, end = (centre(frames[i], scene.colour) / (game.SIZE - 1) for i in (0, 3, -1))
    x, y = game.CORNERS[scene.start]
    assert np.abs(start - (0.25 + 0.5 * x, 0.25 + 0.5 * y)).max() < 0.12
    assert np.abs(end - (0.75 - 0.5 * x, 0.75 - 0.5 * y)).max() < 0.12
    across, down = middle - start
    first = ("向右" if across > 0 else "向左") if abs(across) > abs(down) else ("向下" if down > 0 else "向上")
    assert scene.answer()["tags"][2].startswith(first)
    seen = [centre(frame, scene.prey_colour) is not None for frame in frames]
    assert seen[0]
    assert (seen[4], seen[-1]) == {
        "途中吃掉": (False, False),
        "最后吃掉": (True, False),
        "没有碰到": (True, True),
    }[scene.ending]


def test_dataset_goes_on_where_it_was_interrupted(tmp_path):
    game.write_dataset(tmp_path, train=12, test=4)
    clips = sorted((tmp_path / "clips").iterdir())
    assert len(clips) == 16
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in clips}
    lost = clips[3]
    lost.with_suffix(".unfinished").write_bytes(lost.read_bytes()[:100])
    lost.unlink()
    game.write_dataset(tmp_path, train=12, test=4)
    assert sorted((tmp_path / "clips").iterdir()) == clips
    assert {path for path in clips if path.stat().st_mtime_ns != before[path][0]} == {lost}
    assert lost.read_bytes() == before[lost][1]


def test_tested_scenes_are_never_trained(tmp_path):
    game.write_dataset(tmp_path, train=40, test=10)
    train, test = (json.loads((tmp_path / f"{part}.json").read_text(encoding="utf-8")) for part in ("train", "test"))
    assert (len(train), len(test)) == (40, 10)
    texts = [json.dumps(record["conversations"], ensure_ascii=False) for record in train + test]
    assert len(set(texts)) == len({record["video"] for record in train + test}) == 50
    assert "出发" in (tmp_path / "train.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "dataset_info.json").read_text())["demo_train"] == {
        "file_name": "train.json",
        "formatting": "video_conversation",
    }


def test_too_many_clips_are_refused(tmp_path):
    with pytest.raises(ValueError, match="11500 training and 96 test clips: the game has 11520 scenes"):
        game.write_dataset(tmp_path, train=11500, test=96)


def test_prepare_makes_what_is_missing(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "base")
    half_saved = tmp_path / "tuned" / "checkpoint-100"
    half_saved.mkdir(parents=True)
    main(["--folder", str(tmp_path), "prepare", "--train", "2", "--test", "3"])
    assert not half_saved.exists()
    assert len(json.loads((tmp_path / "test.json").read_text(encoding="utf-8"))) == 3
