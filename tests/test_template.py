"""Prompt ids, labels and pixels against transformers' own processor, and records against the official trainer's way."""

import copy
import unicodedata
from dataclasses import replace

import pytest
import torch
from conftest import decode_all, examples, real_clips, write_clip
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from llamafactory_video.host.rows import from_row, to_row
from llamafactory_video.model.processor import apply_to_processor
from llamafactory_video.prompt.encoder import encode_conversation
from llamafactory_video.prompt.pixels import count_image_tokens, token_type_ids, vision_inputs
from llamafactory_video.prompt.tokens import IGNORE_INDEX, TemplateError, check_chat_template, expand_pads, place_media
from llamafactory_video.records.parse import parse_record
from llamafactory_video.video.probe import probe
from llamafactory_video.video.reader import ClipReader
from llamafactory_video.video.sampling import Sampling
from PIL import Image
from transformers import AutoProcessor
from transformers.image_utils import SizeDict

KEYS = {
    "video_fps": 4.0,
    "video_min_frames": 4,
    "video_maxlen": 8,
    "video_min_pixels": 8192,
    "video_max_pixels": 65536,
}


def reference_processor(processor):
    """The same processor with the settings written into it by hand, as the official trainer means to do."""
    reference = copy.deepcopy(processor)
    video = reference.video_processor
    video.fps, video.min_frames, video.max_frames = 4.0, 4, 8
    video.size = SizeDict(shortest_edge=8192, longest_edge=65536)
    reference.image_processor.size = SizeDict(shortest_edge=4096, longest_edge=32768)
    return reference


def reference_inputs(processor, messages, tools=None, ask=False, **media):
    """What transformers makes of a conversation, given the decoded frames."""
    text = processor.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
    videos = [str(path) for path in media.get("videos", [])]
    kwargs = {}
    if videos:
        frames = [decode_all(path) for path in videos]
        infos = [probe(path)[0].info for path in videos]
        kwargs["videos"] = [torch.from_numpy(f).permute(0, 3, 1, 2) for f in frames]
        kwargs["video_metadata"] = [
            {"fps": info.fps, "total_num_frames": len(f), "duration": info.duration}
            for f, info in zip(frames, infos, strict=True)
        ]
    if media.get("images"):
        kwargs["images"] = [Image.open(path).convert("RGB") for path in media["images"]]
    return processor(text=[text], return_tensors="pt", **kwargs)


def our_inputs(processor, record, generation=False, thinking=False):
    sampling = apply_to_processor(
        "qwen_finetune", {**KEYS, "image_min_pixels": 4096, "image_max_pixels": 32768}, processor
    ).clips
    conversation, problems = parse_record(record, lambda path: str(path))
    assert not problems, [str(problem) for problem in problems]
    clips = [ClipReader(sampling).read(video) for video in conversation.videos]
    plans = [clip.plan for clip in clips]
    ids, labels = encode_conversation(
        conversation, plans, processor.tokenizer, processor, sampling, thinking, generation=generation
    )
    return ids, labels, vision_inputs(conversation.images, clips, processor, sampling)


def assert_same(reference, ids, pixels):
    assert ids == reference["input_ids"][0].tolist()
    assert set(pixels) == set(reference) - {"input_ids", "attention_mask", "mm_token_type_ids"}
    for key, value in pixels.items():
        assert torch.equal(value, reference[key]), key


def answers(processor, ids, labels):
    """Runs of supervised tokens as text."""
    runs, run = [], []
    for token, label in zip(ids, labels, strict=True):
        assert label in (token, IGNORE_INDEX)
        if label == token:
            run.append(token)
        elif run:
            runs.append(run)
            run = []
    return [processor.tokenizer.decode(run) for run in [*runs, *([run] if run else [])]]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.effect_noise((150, 90), 60).convert("RGB").save(path)
    return path


def test_one_clip_is_what_transformers_makes(processor, clip):
    record = {
        "video": str(clip),
        "conversations": [
            {"from": "human", "value": "<video>\n描述这个视频并进行打标,使用json输出标签"},
            {"from": "gpt", "value": {"video_description": "一场比赛", "tags": ["凯"]}},
        ],
    }
    answer = '{"video_description": "一场比赛", "tags": ["凯"]}'
    question = [{"type": "video", "video": "-"}, {"type": "text", "text": "描述这个视频并进行打标,使用json输出标签"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    reference = reference_inputs(reference_processor(processor), messages, videos=[clip])
    ids, labels, pixels = our_inputs(processor, record)
    assert_same(reference, ids, pixels)
    assert answers(processor, ids, labels) == [f"{answer}<|im_end|>\n"]
    types = token_type_ids(torch.tensor([ids]), processor)
    assert torch.equal(types, torch.as_tensor(reference["mm_token_type_ids"]))

    prompt, label, _ = our_inputs(processor, record, generation=True)
    asked = reference_inputs(reference_processor(processor), messages[:1], ask=True, videos=[clip])
    assert prompt == asked["input_ids"][0].tolist()
    assert processor.tokenizer.decode(label) == f"{answer}<|im_end|>\n"


def test_clips_and_images_over_several_turns(processor, clip, picture, tmp_path):
    other = write_clip(tmp_path / "other.mp4", frames=7, fps=3, size=(96, 64), seed=1)
    record = {
        "videos": [str(clip), str(other), str(clip)],
        "images": [str(picture)],
        "system": "你是解说。",
        "messages": [
            {"role": "user", "content": "看 <video> 和 <video>，再看 <image> 。"},
            {"role": "assistant", "content": " 好的。\n"},
            {"role": "user", "content": "没有视频"},
            {"role": "assistant", "content": "\n\n是"},
            {"role": "user", "content": "<video>"},
            {"role": "assistant", "content": "完"},
        ],
    }

    def item(kind, text=""):
        return {"type": kind, kind: text or "-"}

    messages = [
        {"role": "system", "content": [item("text", "你是解说。")]},
        {
            "role": "user",
            "content": [
                *(item("text", "看"), item("video"), item("text", "和"), item("video")),
                *(item("text", "，再看"), item("image"), item("text", "。")),
            ],
        },
        {"role": "assistant", "content": " 好的。\n"},
        {"role": "user", "content": "没有视频"},
        {"role": "assistant", "content": "\n\n是"},
        {"role": "user", "content": [item("video")]},
        {"role": "assistant", "content": "完"},
    ]
    reference = reference_inputs(
        reference_processor(processor), messages, videos=[clip, other, clip], images=[picture]
    )
    ids, labels, pixels = our_inputs(processor, record)
    assert_same(reference, ids, pixels)
    said = answers(processor, ids, labels)
    # A newline before the answer may merge with the one that ends "assistant"; the merged token is supervised.
    assert [text.lstrip("\n") for text in said] == [" 好的。\n<|im_end|>\n", "是<|im_end|>\n", "完<|im_end|>\n"]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<>", exclude_categories=("Cs",)), min_size=1).filter(
    lambda text: text.strip()
)


@examples(150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.none() | TEXT, st.booleans())
def test_any_text_conversation_equals_apply_chat_template(processor, turns, system, use_tools):
    tools = (
        [{"type": "function", "function": {"name": "seek", "parameters": {"type": "object"}}}] if use_tools else None
    )
    messages = [{"role": "system", "content": system}] if system else []
    for human, gpt in turns:
        # As items in a list, texts are taken as they are; as plain strings, human turns are stripped.
        messages.append({"role": "user", "content": [{"type": "text", "text": human}]})
        messages.append({"role": "assistant", "content": gpt})
    reference = reference_inputs(processor, messages, tools=tools)
    ids, labels, _ = our_inputs(processor, {"messages": messages, "tools": tools})
    assert ids == reference["input_ids"][0].tolist()
    said = answers(processor, ids, labels)
    # Qwen's tokenizer composes characters (NFC) before it cuts them into tokens.
    told = [unicodedata.normalize("NFC", f"{gpt}<|im_end|>\n") for _, gpt in turns]
    assert [text.lstrip("\n") for text in said] == [text.lstrip("\n") for text in told]


def test_tool_turns_equal_apply_chat_template(processor):
    call = {"function": {"name": "seek", "arguments": {"second": 3, "why": "看"}}}
    messages = [
        {"role": "user", "content": "找"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "found"},
        {"role": "tool", "content": "again"},
        {"role": "assistant", "content": "在 3 秒"},
    ]
    record = copy.deepcopy(messages)
    record[1]["content"] = None
    tools = [{"type": "function", "function": {"name": "seek"}}]
    reference = reference_inputs(processor, messages, tools=tools)
    ids, labels, _ = our_inputs(processor, {"messages": record, "tools": tools})
    assert ids == reference["input_ids"][0].tolist()
    assert answers(processor, ids, labels)[-1] == "在 3 秒<|im_end|>\n"


CLIPS = [
    pytest.param(path, marks=pytest.mark.thorough if number > 2 else []) for number, path in enumerate(real_clips())
]


@pytest.mark.parametrize("path", CLIPS or [None], ids=lambda path: path.name if path else "none")
def test_real_clips_are_what_transformers_makes(path):
    if path is None:
        pytest.skip("the real clips (../shared/videos) are not present")
    processor = AutoProcessor.from_pretrained(path.parents[1] / "qwen3vl")
    record = {
        "video": str(path),
        "conversations": [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "."}],
    }
    question = [{"type": "video", "video": "-"}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "."}]
    ids, _, pixels = our_inputs(processor, record)
    assert_same(reference_inputs(reference_processor(processor), messages, videos=[path]), ids, pixels)


def test_llamafactorys_dialect_shows_what_llamafactory_shows(clip, picture, tmp_path):
    """Its own plugin on the same clip and image, where it has no fault: one clip, constant rate."""
    from types import SimpleNamespace

    from llamafactory.data.mm_plugin import get_mm_plugin
    from llamafactory.model.patcher import patch_processor
    from llamafactory_video.demo.tiny_model import build_processor

    keys = {"video_fps": 3.0, "video_maxlen": 6, "video_min_pixels": 256, "video_max_pixels": 3000}
    image_keys = {"image_min_pixels": 1024, "image_max_pixels": 9000}
    others = dict.fromkeys(["image_do_pan_and_scan", "crop_to_patches", "use_audio_in_video"], False)
    stock_processor = build_processor()
    arguments = SimpleNamespace(**keys, **image_keys, **others, audio_sampling_rate=16000, video_template=False)
    patch_processor(stock_processor, stock_processor.tokenizer, arguments)
    stock = get_mm_plugin("qwen3_vl", image_token="<|image_pad|>", video_token="<|video_pad|>")

    processor = build_processor()
    sampling = apply_to_processor("llamafactory", {**keys, **image_keys}, processor).clips
    for images, videos in (([str(picture)], []), ([], [str(clip)])):
        expected = stock._get_mm_inputs(images, videos, [], stock_processor)
        clips = [ClipReader(sampling).read(video) for video in videos]
        got = vision_inputs(images, clips, processor, sampling)
        for key, value in got.items():
            assert torch.equal(value, torch.as_tensor(expected[key])), key
        messages = [{"role": "user", "content": "<image>" * len(images) + "<video>" * len(videos)}]
        text = stock.process_messages(messages, images, videos, [], stock_processor)[0]["content"]
        told = processor.tokenizer.encode(text, add_special_tokens=False)
        plans = [clip.plan for clip in clips]
        placed = processor.tokenizer.encode(place_media(messages[0]["content"], list(plans)), add_special_tokens=False)
        tokens = [count_image_tokens(image, processor.image_processor, sampling) for image in images]
        pads = processor.image_token_id, processor.video_token_id
        assert expand_pads(placed, None, tokens, plans, *pads)[0] == told


def test_bare_tools_are_written_as_in_training(processor):
    """LLaMA-Factory's records and API hold a tool's inside alone."""
    bare, wrapped = {"name": "seek"}, {"type": "function", "function": {"name": "seek"}}
    asked = [our_inputs(processor, {"tools": [tool], "conversations": TURNS})[0] for tool in (bare, wrapped)]
    assert asked[0] == asked[1]


def test_pads_spelled_out_in_a_text_are_refused(processor):
    pad = processor.video_token_id
    with pytest.raises(TemplateError, match="holds 1 .*video_pad.* but 0 are expected"):
        expand_pads([1, pad, 2], None, [], [], processor.image_token_id, pad)


def test_template_for_another_model_is_named(processor):
    check_chat_template(processor.tokenizer, thinking=False)
    with pytest.raises(TemplateError, match="is `template: qwen3_vl_video` meant"):
        check_chat_template(processor.tokenizer, thinking=True)
    processor.tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="has no chat template"):
        check_chat_template(processor.tokenizer, thinking=False)


TURNS = [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]

THINKING_TEMPLATE = """
{%- set last = namespace(query=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.query = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- set answer = message.content.split('</think>')[-1].lstrip('\\n') %}
{%- set thought = message.content.split('</think>')[0].split('<think>')[-1] if '</think>' in message.content else '' %}
{%- if loop.index0 > last.query %}{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
{{- answer }}
{%- else %}{{- message.content }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""


def test_thinking_models_say_their_thoughts(processor):
    """A template with the behaviour of the Thinking models: thoughts are shown in the last turn alone."""
    processor.chat_template = processor.tokenizer.chat_template = THINKING_TEMPLATE
    check_chat_template(processor.tokenizer, thinking=True)
    messages = [
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "<think>\n旧\n</think>\n\n答"},
        {"role": "user", "content": "再问"},
        {"role": "assistant", "content": "<think>\n想\n</think>\n\n再答"},
    ]
    ids, labels, _ = our_inputs(processor, {"messages": messages}, thinking=True)
    assert ids == reference_inputs(processor, messages)["input_ids"][0].tolist()
    assert answers(processor, ids, labels) == ["答<|im_end|>\n", "想\n</think>\n\n再答<|im_end|>\n"]


@pytest.mark.parametrize("answer", ["答", "<think>\n想\n</think>\n\n答", "<think>\n\n想"])
def test_thinking_models_are_trained_to_go_on_from_how_they_are_asked(processor, answer):
    """Also without a thought, whose newlines would merge with the one that ends the question."""
    processor.chat_template = processor.tokenizer.chat_template = THINKING_TEMPLATE
    messages = [{"role": "user", "content": "问"}, {"role": "assistant", "content": answer}]
    ids, labels, _ = our_inputs(processor, {"messages": messages}, thinking=True)
    asked, label, _ = our_inputs(processor, {"messages": messages}, thinking=True, generation=True)
    assert asked == reference_inputs(processor, messages[:1], ask=True)["input_ids"][0].tolist()
    assert ids[: len(asked)] == asked
    assert ids[len(asked) :] == label == [token for token in labels if token != IGNORE_INDEX]


@pytest.mark.parametrize("thinking", [False, True])
def test_answers_that_are_not_trained_on_have_no_labels(processor, thinking):
    """Through the table, in any turn; ids are those of a record that is trained on whole."""
    said = ["坏的回答", "好的回答", "又一个"]
    for unlearnt in ([0], [1], [0, 2]):
        turns = [{"role": "system", "content": "规则"}]
        for number, text in enumerate(said):
            turns.append({"role": "user", "content": f"问{number}"})
            turns.append({"role": "assistant", "content": text, "loss": number not in unlearnt})
        conversation, problems = parse_record({"messages": turns}, str)
        assert not problems
        assert from_row(to_row(conversation)).unlearnt == conversation.unlearnt
        stored = replace(from_row(to_row(conversation)), source="x")
        tokenizer = processor.tokenizer
        ids, labels = encode_conversation(stored, [], tokenizer, processor, Sampling("llamafactory"), thinking)
        whole, all_labels = encode_conversation(
            replace(stored, unlearnt=()), [], tokenizer, processor, Sampling("llamafactory"), thinking
        )
        assert ids == whole
        learnt = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
        assert [text in learnt for text in said] == [number not in unlearnt for number in range(3)]
        assert all(label in (IGNORE_INDEX, full) for label, full in zip(labels, all_labels, strict=True))
