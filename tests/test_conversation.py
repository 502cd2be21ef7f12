"""The record format: what is read of right records, and what is said of wrong ones."""

import json

import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from llamafactory_video.host.chat import take_inline_media
from llamafactory_video.media import Clip
from llamafactory_video.records.clips import RecordKeys, decode_clip
from llamafactory_video.records.json_text import json_text, read_json
from llamafactory_video.records.parse import parse_record

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=20,
)


@examples(500)
@given(JSON_VALUES, st.none() | st.integers(1, 4))
def test_json_text_is_pythons_with_the_authors_characters(value, indent):
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    assert json_text(read_json(text)[0], indent) == text


@pytest.mark.parametrize(
    "number", ["1.0", "1e3", "0.10", "-0", "12345678901234567890123", "1E+2", "3.14159265358979323846"]
)
def test_numbers_stay_as_written(number):
    assert json_text(read_json(f'{{"b": {number}, "a": [{number}]}}')[0]) == f'{{"b": {number}, "a": [{number}]}}'


def parse(record, **kwargs):
    text = record if isinstance(record, str) else json.dumps(record, ensure_ascii=False)
    missing = kwargs.pop("missing", "missing")
    return parse_record(read_json(text)[0], lambda path: None if missing in path else f"/media/{path}", **kwargs)


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def good(record, **kwargs):
    conversation, problems = parse(record, **kwargs)
    assert not problems, [str(problem) for problem in problems]
    return conversation


def complaints(record):
    _, problems = parse(record)
    return [str(problem) for problem in problems]


def test_the_usual_record():
    answer = {"video_description": "……", "tags": ["游戏直播", "王者荣耀", "凯"]}
    conversation = good(
        {"video": "wzry/4/1.mp4", "conversations": turns("<video>\n描述这个视频并进行打标,使用json输出标签", answer)}
    )
    assert conversation.messages == [
        ("user", "<video>描述这个视频并进行打标,使用json输出标签"),
        ("assistant", '{"video_description": "……", "tags": ["游戏直播", "王者荣耀", "凯"]}'),
    ]
    assert conversation.videos == [Clip(path="/media/wzry/4/1.mp4")]
    record = {"video": "a.mp4", "conversations": turns("<video>", answer)}
    assert good(record, indent=2).messages[1][1] == json.dumps(answer, ensure_ascii=False, indent=2)


@pytest.mark.parametrize("answer", ["文字", {"a": None}, ["凯", 1.50], 7, True, False, {}, []])
def test_any_json_value_is_an_answer(answer):
    expected = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    assert good({"conversations": turns("问", answer)}).messages[1][1] == expected


def test_two_spellings_give_one_conversation():
    ours = good(
        {
            "video": ["a.mp4", "b.mp4"],
            "image": "c.png",
            "conversations": [
                {"from": "system", "value": "规则"},
                *turns("<video><image>甲", "乙", "<video>丙", "丁"),
            ],
        }
    )
    openai = good(
        {
            "messages": [
                {"role": "system", "content": "规则"},
                {
                    "role": "user",
                    "content": [
                        {"type": "video", "video": "a.mp4"},
                        {"type": "image_url", "image_url": {"url": "file://c.png"}},
                        {"type": "text", "text": "甲"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "乙"}]},
                {
                    "role": "user",
                    "content": [{"type": "video", "video": {"path": "b.mp4"}}, {"type": "text", "text": "丙"}],
                },
                {"role": "assistant", "content": "丁"},
            ]
        }
    )
    assert ours == openai


def messages(*contents, **assistant):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    turns[-1].update(assistant)
    return {"messages": turns}


def test_openai_items_lose_nothing():
    item = {"type": "video", "video": "a.mp4", "fps": 1, "max_pixels": 50176, "video_start": 3, "video_end": 9}
    assert good(messages([item], "答")).videos == [Clip("/media/a.mp4", fps=1.0, max_pixels=50176, start=3.0, end=9.0)]
    annotated = [{"type": "text", "text": "一", "annotations": []}, {"type": "text", "text": "二"}]
    assert good(messages("问", annotated)).messages[1] == ("assistant", "一二")
    system = {"role": "system", "content": [{"type": "text", "text": "规则"}]}
    assert good({"messages": [system, *messages("问", "答")["messages"]]}).system == "规则"
    call = {"id": "1", "type": "function", "function": {"name": "seek", "arguments": {"s": 1.50}}}
    text = '{"content": "我看看", "tool_calls": [{"function": {"name": "seek", "arguments": {"s": 1.5}}}]}'
    assert good(messages("问", "我看看", tool_calls=[call])).messages[1] == ("function", text)
    assert good(messages("问", "", tool_calls=[call])).messages[1][0] == "function"
    listed = good({"tools": '[{"name": "seek"}]', "conversations": turns("问", "答")})
    assert listed == good({"tools": [{"name": "seek"}], "conversations": turns("问", "答")})


def test_own_names_of_columns():
    keys = RecordKeys(videos=("clip",))
    record = {"clip": "a.mp4", "video": 7, "videos": [], "conversations": turns("<video>", "答")}
    assert good(record, keys=keys).videos == [Clip("/media/a.mp4")]
    record = {"video": "a.mp4", "videos": [], "conversations": turns("<video>", "答")}
    assert good(record).videos == [Clip("/media/a.mp4")]


def test_a_clip_with_settings_survives_its_encoding():
    settings_ = {"path": "long.mp4", "start": 12.5, "end": 20, "fps": 8, "min_frames": 4, "max_frames": 64}
    (clip,) = good({"video": settings_, "conversations": turns("<video>", "答")}).videos
    assert clip == Clip("/media/long.mp4", start=12.5, end=20.0, fps=8.0, min_frames=4, max_frames=64)
    assert decode_clip(clip.encode()) == clip
    frames = {"frames": ["1.png", "2.png", "3.png"], "times": [0, 0.5, 2.25]}
    (clip,) = good({"videos": [frames], "conversations": turns("<video>", "答")}).videos
    assert clip.times == (0.0, 0.5, 2.25)
    assert decode_clip(clip.encode()) == clip
    (clip,) = good({"videos": [["1.png", "2.png"]], "conversations": turns("<video>", "答")}).videos
    assert clip.frames == ("/media/1.png", "/media/2.png")
    for odd in (Clip(path="{odd}.mp4"), Clip(path="视频.mp4")):
        assert decode_clip(odd.encode()) == odd


WRONG = {
    "no turns": ({}, "conversations: missing; a list of turns"),
    "turns are text": ({"conversations": "问"}, 'conversations: "问"; a list of turns'),
    "unknown role": ({"conversations": [{"from": "bot", "value": "x"}]}, 'conversations[0].from: unknown role "bot"'),
    "no role": ({"conversations": [{"value": "x"}]}, "conversations[0].from: missing"),
    "gpt first": ({"conversations": turns("问", "答")[::-1]}, "conversations[0]: gpt turn first; turns go"),
    "two humans": ({"conversations": [turns("问")[0]] * 2}, "conversations[1]: human turn after human turn"),
    "no answer": ({"conversations": turns("问", "答", "再问")}, "conversations[2]: ends with a human turn; the last"),
    "empty answer": ({"conversations": turns("问", " ")}, "conversations[1].value: empty; a text is needed"),
    "null answer": ({"conversations": turns("问", None)}, "conversations[1].value: null; a text is needed"),
    "missing clip": (
        {"video": "missing.mp4", "conversations": turns("<video>", "答")},
        'video: no file "missing.mp4"; give a path relative to media_dir',
    ),
    "no placeholder": (
        {"video": "a.mp4", "conversations": turns("问", "答")},
        "video: 1 video(s) and 0 <video> in the turns; one <video> is needed for each",
    ),
    "no clip": ({"conversations": turns("<video>", "答")}, "video: 0 video(s) and 1 <video> in the turns"),
    "placeholder in answer": (
        {"video": "a.mp4", "conversations": turns("<video>", "看<video>")},
        "conversations[1].value: a placeholder in a gpt turn; clips and images are shown in human turns",
    ),
    "layout token": (
        {"conversations": turns("<|video_pad|>", "答")},
        "conversations[0].value: holds <|video_pad|>; this token lays out the prompt",
    ),
    "both names": (
        {"video": "a.mp4", "videos": ["a.mp4"], "conversations": turns("<video>", "答")},
        "videos: stands beside video; keep one of the two",
    ),
    "address": (
        {"video": "https://x/a.mp4", "conversations": turns("<video>", "答")},
        'video: "https://x/a.mp4"; addresses are not fetched',
    ),
    "start after end": (
        {"video": {"path": "a.mp4", "start": 5, "end": 4}, "conversations": turns("<video>", "答")},
        "video.end: 4; it must be after start, 5 s",
    ),
    "unknown setting": (
        {"video": {"path": "a.mp4", "frame": 4}, "conversations": turns("<video>", "答")},
        "video.frame: unknown setting; known are path, frames",
    ),
    "falling times": (
        {"video": {"frames": ["1.png", "2.png"], "times": [1, 0]}, "conversations": turns("<video>", "答")},
        "video.times: [1, 0]; times must increase",
    ),
    "number of frames": (
        {"video": {"path": "a.mp4", "max_frames": 2.5}, "conversations": turns("<video>", "答")},
        "video.max_frames: 2.5; a whole number is needed",
    ),
    "two systems": (
        {"system": "甲", "conversations": [{"from": "system", "value": "乙"}, *turns("问", "答")]},
        "system: stands beside a system turn",
    ),
    "system later": (
        {"conversations": [*turns("问", "答"), {"from": "system", "value": "乙"}, *turns("问", "答")]},
        "conversations[2]: system turn after gpt turn",
    ),
    "not an object": ("7", "record: 7; a JSON object is needed"),
    "not a text": (
        messages("问", [{"type": "text", "text": None}]),
        'messages[1].content: [{"type": "text", "text": null}]; items {"type": "text"',
    ),
    "a thought beside": (
        messages("问", "答", reasoning_content="因为"),
        "messages[1].reasoning_content: a thought; write it into the content",
    ),
    "no calls": (messages("问", "", tool_calls=5), "messages[1].tool_calls: "),
    "call without name": (
        {"conversations": [turns("问")[0], {"from": "function_call", "value": '{"nam": 1}'}]},
        'conversations[1].value: "{\\"nam\\": 1}"; calls {"name"',
    ),
    "call not JSON": (
        {"conversations": [turns("问")[0], {"from": "function_call", "value": "seek"}]},
        'conversations[1].value: "seek": not JSON',
    ),
    "tools not JSON": (
        {"tools": "seek(s)", "conversations": turns("问", "答")},
        'tools: "seek(s)"; a list of tools, or its JSON text, is needed',
    ),
    "system ends itself": (
        {"system": "x<|im_end|>", "conversations": turns("问", "答")},
        "system: holds <|im_end|>; this token lays out the prompt",
    ),
    "setting of an image": (
        messages([{"type": "image", "image": "a.png", "max_pixels": 5}], "答"),
        "messages[0].content[0].max_pixels: unknown setting",
    ),
    "setting of an item": (
        messages([{"type": "video", "video": "a.mp4", "video_fps": 5}], "答"),
        "messages[0].content[0].video.video_fps: unknown setting",
    ),
    "endless": (
        '{"video": {"path": "a.mp4", "max_frames": 1e400}, "conversations": [{"from": "human", "value": "<video>"}]}',
        "video.max_frames: 1e400; ",
    ),
    "unknown item": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}, {"role": "assistant", "content": "答"}]},
        'messages[0].content[0]: {"type": "audio"}; an item',
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_records_say_what_is_wrong_and_what_would_be_right(name):
    record, expected = WRONG[name]
    assert any(line.startswith(expected) for line in complaints(record)), complaints(record)


def test_all_problems_of_a_record_are_listed():
    record = {"video": ["missing1.mp4", "missing2.mp4"], "conversations": turns("<video>", "")}
    assert len(complaints(record)) == 4


def test_what_is_not_quite_json_is_named():
    assert read_json('{"a": 1, "a": 2}')[1] == ['the key "a" stands twice in one object']
    assert read_json("[NaN]")[1] == ["[0] is NaN, which is no JSON; write null"]
    assert read_json("[1e999]") == ([float("inf")], [])
    assert read_json('{"a"')[1] == ["not JSON: Expecting ':' delimiter at character 4"]


def test_clips_and_pictures_typed_into_chat():
    said = {"role": "assistant", "content": "用 <video> 标签"}
    messages = [{"role": "user", "content": "<video>a b.mp4</video> <image>c.png</image>描述"}, said]
    taken, videos, images = take_inline_media(messages)
    assert (videos, images) == (["a b.mp4"], ["c.png"])
    assert taken == [{"role": "user", "content": "<video> <image>描述"}, said]
    for text in ("<video>a.mp4描述", "<image>", "<video>a.mp4<video>b.mp4</video>"):
        with pytest.raises(ValueError, match="without its end; write <"):
            take_inline_media([{"role": "user", "content": text}])


def test_slips_in_names_of_fields_are_named():
    assert complaints({"vidoe": "a.mp4", "conversations": turns("问", "答")}) == [
        "vidoe: unknown field; is video meant?"
    ]
    good({"id": 7, "video_id": "x", "source": "y", "messages_zh": [], "conversations": turns("问", "答")})


# --- Nothing is dropped without a word --------------------------------------------------------------------------------


def test_settings_beside_the_one_clip_are_its_own():
    record = {
        "video": "a.mp4",
        "video_start": 1.0,
        "video_end": 2.0,
        "fps": 4,
        "conversations": turns("<video>问", "答"),
    }
    conversation = good(record)
    assert conversation.videos == [Clip(path="/media/a.mp4", start=1.0, end=2.0, fps=4.0)]
    names = ("fps", "video_end", "video_start")
    assert sorted(conversation.notes) == [f"{name} beside the clip is taken as its setting" for name in names]
    shown = good({"videos": [["0.jpg", "1.jpg"]], "frame_rate": 2, "conversations": turns("<video>问", "答")})
    assert shown.videos == [Clip(frames=("/media/0.jpg", "/media/1.jpg"), frame_rate=2.0)]
    for wrong, message in (
        (
            {"videos": ["a.mp4", "b.mp4"], "fps": 2, "conversations": turns("<video><video>问", "答")},
            "fps: a setting beside 2 clips; it belongs into",
        ),
        ({"fps": 2, "conversations": turns("问", "答")}, "fps: a setting beside 0 clips"),
        (
            {"video": {"path": "a.mp4", "fps": 2}, "fps": 3, "conversations": turns("<video>问", "答")},
            "fps: stands in the clip too; keep one",
        ),
    ):
        assert any(complaint.startswith(message) for complaint in complaints(wrong)), complaints(wrong)


def test_turns_that_are_not_trained_on():
    def said(name, *values):
        messages = [
            {"role": "user", "content": "问"},
            {"role": "assistant", "content": "坏", name: values[0]},
            {"role": "user", "content": "再问"},
            {"role": "assistant", "content": "好", name: values[1]},
        ]
        return {"messages": messages}

    for name, no, yes in (("loss", False, True), ("weight", 0, 1), ("loss", 0.0, None)):
        assert good(said(name, no, yes)).unlearnt == (1,)
    assert good(said("loss", True, True)).unlearnt == ()
    # A system turn is no message of its own.
    first = {"messages": [{"role": "system", "content": "你是解说"}, *said("loss", False, True)["messages"]]}
    assert good(first).unlearnt == (1,)
    assert complaints(said("loss", False, False)) == [
        "conversations: no answer is trained on; at least one without `loss: false` is needed"
    ]
    assert "messages[1].weight: 0.5; true or 1 trains on an answer" in complaints(said("weight", 0.5, 1))[0]
    asked = {"messages": [{"role": "user", "content": "问", "loss": True}, {"role": "assistant", "content": "答"}]}
    assert "answers alone are trained on" in complaints(asked)[0]
    asked["messages"][0]["loss"] = False
    assert good(asked).unlearnt == ()


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {
                "query": "<video>问",
                "response": "答",
                "history": [["前问", "前答"]],
                "videos": ["a.mp4"],
                "system": "规则",
            },
            ["前问", "前答", "<video>问", "答"],
        ),
        (
            {"instruction": "描述", "input": "<video>", "output": {"标签": 1}, "video": "a.mp4"},
            ["描述\n<video>", '{"标签": 1}'],
        ),
        ({"q": "<video>问", "a": "答", "video": "a.mp4"}, ["<video>问", "答"]),
    ],
)
def test_questions_and_answers_in_fields_of_their_own(record, expected):
    conversation = good(record)
    assert [text for _, text in conversation.messages] == [text.replace("\n<video>", "<video>") for text in expected]
    assert any("are taken as question and answer" in note for note in conversation.notes)
    assert conversation.system == record.get("system", "")


def test_a_video_where_a_picture_is_written():
    conversation = good({"video": "a.mp4", "conversations": turns("<image>\n问", "答", "再问", "再答")})
    assert conversation.messages[0] == ("user", "<video>问")
    assert conversation.notes == ["<image> is taken as <video>, since the record has clips and no pictures"]
    assert complaints({"video": "a.mp4", "image": "b.png", "conversations": turns("<image>问", "答")})
    (complaint,) = complaints({"videos": [["a.mp4"]], "conversations": turns("<video>问", "答")})[:1]
    assert "a.mp4 is a video; a list in the list of clips holds frames: one pair of brackets less" in complaint


def test_a_system_prompt_under_its_other_name():
    conversation = good({"system_prompt": "只答一个词", "conversations": turns("问", "答")})
    assert conversation.system == "只答一个词"
    assert conversation.notes == ["system_prompt is taken as system"]


def test_what_is_not_known_is_told():
    record = {"id": 3, "conversations": turns("问", "答"), "source_url": "x", "nothing": None}
    record["conversations"][1]["emotion"] = "喜"
    assert sorted(good(record).notes) == [
        "a turn's field emotion is not read",
        "field id is not read",
        "field source_url is not read",
    ]
    told = RecordKeys(unknown="error")
    _, problems = parse(record, keys=told)
    assert sorted(map(str, problems)) == [
        "emotion: a turn's field that is not read; remove it, or set `unknown_fields: warn`",
        "id: field that is not read; remove it, or set `unknown_fields: warn`",
        "source_url: field that is not read; remove it, or set `unknown_fields: warn`",
    ]
    assert good(record, keys=RecordKeys(unknown="ignore")).notes == []
    assert any("caption: unknown field; write turns" in c for c in complaints({"video": "a.mp4", "caption": "一段"}))
    grounded = {
        "messages": [{"role": "user", "content": "找<ref-object>"}, {"role": "assistant", "content": "<bbox>"}],
        "objects": {"bbox": []},
    }
    assert "ms-swift fills it in from `objects`" in complaints(grounded)[0]
    ranked = {
        "conversations": turns("问"),
        "chosen": {"from": "gpt", "value": "好"},
        "rejected": {"from": "gpt", "value": "坏"},
    }
    assert complaints(ranked)
