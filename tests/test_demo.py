"""The demo's parts: the tiny model, the clips, the report."""

from pathlib import Path

import pytest
from llamafactory_video.demo import tiny_model
from transformers import AutoProcessor

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
