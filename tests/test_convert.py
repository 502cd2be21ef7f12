"""`lmf-video convert`: records of other tools, against LLaMA-Factory's own converters where it reads them too."""

import json
from types import SimpleNamespace

import pytest
from conftest import write_clip
from llamafactory.data.converter import get_dataset_converter
from llamafactory.data.parser import DatasetAttr
from llamafactory_video.records.parse import parse_record
from processes import run

ANSWER = {"tags": ["王者荣耀", "团战"], "scene": "游戏", "score": 1.50}
TEXT = json.dumps(ANSWER, ensure_ascii=False)
RECORDS = {
    "ms-swift": (
        {"messages": [{"role": "user", "content": "<video>描述"}, {"role": "assistant", "content": TEXT}], "videos": ["a.mp4"]},
        {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>描述"}, {"from": "gpt", "value": ANSWER}]},
    ),
    "ms-swift's query": (
        {"system": "说", "query": "再说", "response": "好", "history": [["看", "一座塔"]], "videos": ["a.mp4", "b.mp4"]},
        {
            "video": ["a.mp4", "b.mp4"],
            "system": "说",
            "conversations": [
                {"from": "human", "value": "<video><video>看"},
                {"from": "gpt", "value": "一座塔"},
                {"from": "human", "value": "再说"},
                {"from": "gpt", "value": "好"},
            ],
        },
    ),
    "ms-swift's loss": (
        {
            "messages": [
                {"role": "user", "content": "看"},
                {"role": "assistant", "content": "坏", "loss": False},
                {"role": "user", "content": "再看"},
                {"role": "assistant", "content": "好", "loss": True},
            ],
            "videos": ["a.mp4"],
        },
        {
            "video": "a.mp4",
            "conversations": [
                {"from": "human", "value": "<video>看"},
                {"from": "gpt", "value": "坏", "loss": False},
                {"from": "human", "value": "再看"},
                {"from": "gpt", "value": "好"},
            ],
        },
    ),
    "LLaVA-Video": (
        {
            "id": "1",
            "data_source": "x",
            "video": "a.mp4",
            "conversations": [{"from": "human", "value": "<image>\n问"}, {"from": "gpt", "value": "答"}],
        },
        {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>问"}, {"from": "gpt", "value": "答"}]},
    ),
    "VideoChatGPT": (
        {"q": "问", "a": "答", "video_id": "v_1"},
        {"video": "v_1.webm", "conversations": [{"from": "human", "value": "<video>问"}, {"from": "gpt", "value": "答"}]},
    ),
    "VideoChatGPT's evaluation": (
        {"Q": "问", "A": "答", "video_name": "v_1"},
        {"video": "v_1.webm", "conversations": [{"from": "human", "value": "<video>问"}, {"from": "gpt", "value": "答"}]},
    ),
    "alpaca": (
        {"instruction": "<video>问", "input": "再问", "output": "答", "system": "说", "videos": ["a.mp4"]},
        {
            "video": "a.mp4",
            "system": "说",
            "conversations": [{"from": "human", "value": "<video>问\n再问"}, {"from": "gpt", "value": "答"}],
        },
    ),
    "OpenAI": (
        {
            "messages": [
                {"role": "system", "content": "说"},
                {
                    "role": "user",
                    "content": [
                        {"type": "video_url", "video_url": {"url": "a.mp4"}, "fps": 2},
                        {"type": "text", "text": "问"},
                        {"type": "image_url", "image_url": {"url": "c.png"}},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "答"}], "weight": 1},
            ]
        },
        {
            "video": {"fps": 2.0, "path": "a.mp4"},
            "image": "c.png",
            "system": "说",
            "conversations": [{"from": "human", "value": "<video>问<image>"}, {"from": "gpt", "value": "答"}],
        },
    ),
    "OpenAI's tools": (
        {
            "tools": [{"type": "function", "function": {"name": "seek", "parameters": {"least": 1.0}}}],
            "messages": [
                {"role": "user", "content": "去第三秒"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "function": {"name": "seek", "arguments": {"s": 3.0}}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "到了"},
                {"role": "assistant", "content": "到了。"},
            ],
        },
        {
            "tools": [{"type": "function", "function": {"name": "seek", "parameters": {"least": 1.0}}}],
            "conversations": [
                {"from": "human", "value": "去第三秒"},
                {
                    "from": "function_call",
                    "value": {"content": "", "tool_calls": [{"function": {"name": "seek", "arguments": {"s": 3.0}}}]},
                },
                {"from": "observation", "value": "到了"},
                {"from": "gpt", "value": "到了。"},
            ],
        },
    ),
    "Qwen's trainer": (
        [
            {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\n问"}, {"from": "gpt", "value": "答"}]},
            {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "[1, 2.50]"}]},
        ],
        [
            {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>问"}, {"from": "gpt", "value": "答"}]},
            {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": [1, 2.5]}]},
        ],
    ),
}  # fmt: skip


@pytest.fixture
def media(tmp_path):
    for name in ("a.mp4", "b.mp4", "v_1.webm", "c.png"):
        (tmp_path / "media").mkdir(exist_ok=True)
        (tmp_path / "media" / name).touch()
    return tmp_path / "media"


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("named", [True, False], ids=["media-dir", "as given"])
def test_records_of_other_tools(tmp_path, media, kind, named):
    given, wanted = RECORDS[kind]
    (tmp_path / "theirs.json").write_text(json.dumps([given], ensure_ascii=False), encoding="utf-8")
    folder = ["--media-dir", str(media)] if named else []
    told = run("lmf-video", "convert", str(tmp_path / "theirs.json"), str(tmp_path / "ours.jsonl"), *folder)
    assert told.returncode == 0, told.stderr
    lines = (tmp_path / "ours.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = wanted if isinstance(wanted, list) else [wanted]
    if not named:  # where nobody can look, it is an MP4 file
        wanted = json.loads(json.dumps(wanted).replace("v_1.webm", "v_1.mp4"))
    assert [json.loads(line) for line in lines] == wanted
    assert '"file_name": ' in told.stdout and "\\u" not in "".join(lines)
    # What is written is one of our records, and reads as what was read.
    for line in lines:
        _, problems = parse_record(json.loads(line), lambda path: path)
        assert not problems


@pytest.mark.parametrize(
    ("kind", "formatting"), [("alpaca", "alpaca"), ("ms-swift's loss", "sharegpt"), ("LLaVA-Video", "sharegpt")]
)
def test_turns_are_those_that_llamafactory_reads(kind, formatting):
    given, wanted = RECORDS[kind]
    attr = DatasetAttr("file", "x.json", formatting=formatting, system="system" if "system" in given else None)
    if "messages" in given:
        attr.messages, attr.role_tag, attr.content_tag = "messages", "role", "content"
        attr.user_tag, attr.assistant_tag = "user", "assistant"
    row = get_dataset_converter(formatting, attr, SimpleNamespace(media_dir=""))(given)
    texts = [turn["content"] for turn in row["_prompt"] + row["_response"]]
    ours = [turn["value"] for turn in wanted["conversations"]]
    bare = str.maketrans({"\n": None})
    assert [text.replace("<image>", "").replace("<video>", "").translate(bare) for text in texts] == [
        text.replace("<video>", "").translate(bare) for text in ours
    ]
    assert row["_system"] == wanted.get("system", "")


def test_what_cannot_be_taken_over_is_listed(tmp_path, media):
    turns = [{"role": "user", "content": "看"}, {"role": "assistant", "content": "塔"}]
    records = [
        {"messages": turns, "videos": ["a.mp4"]},
        {"messages": turns, "videos": ["gone.mp4"]},
        {"messages": turns, "rejected_response": "坏"},
        {"messages": [turns[0], {"role": "assistant", "content": "<bbox>"}], "objects": {"bbox": [[1, 2, 3, 4]]}},
        {"caption": "一座塔", "video": "a.mp4"},
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records] + ["{"]
    (tmp_path / "theirs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = ["lmf-video", "convert", str(tmp_path / "theirs.jsonl")]
    told = run(*words, str(tmp_path / "ours.jsonl"), "--media-dir", str(media))
    assert told.returncode == 1 and "5 records are not written" in told.stderr
    for part in (
        'record 2 (line 2): videos[0]: no file "gone.mp4"',
        "record 3 (line 3): rejected_response: ranking data",
        "record 4 (line 4): objects: <bbox>",
        "record 5 (line 5): caption: unknown field",
        "record 6 (line 6): record: not JSON",
    ):
        assert part in told.stderr and part in (tmp_path / "ours.jsonl.wrong.txt").read_text(encoding="utf-8")
    assert "<video> and <image> are put before the first question, which had none (1 times" in told.stdout
    assert len((tmp_path / "ours.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    told = run(*words, str(tmp_path / "theirs.jsonl"))
    assert told.returncode == 1 and "would replace the records that it is made from" in told.stderr
    (tmp_path / "none.json").write_text('[{"caption": "x"}]')
    told = run("lmf-video", "convert", str(tmp_path / "none.json"), str(tmp_path / "none.jsonl"))
    assert "no record of it could be converted" in told.stderr and not (tmp_path / "none.jsonl").exists()
    assert run(*words, "x", "--media-dir", str(tmp_path / "nowhere")).stderr.startswith(
        "lmf-video: --media-dir: no fol"
    )


def test_converted_records_are_trained_on_as_they_stand(tmp_path):
    """A clip's settings, and its place in another folder than the one that is current."""
    write_clip(tmp_path / "media/deep/a.mp4")
    record = {"video": {"path": "deep/a.mp4", "start": 0.5}, "question": "谁", "answer": "凯"}
    (tmp_path / "theirs.json").write_text(json.dumps(record), encoding="utf-8")
    words = ["convert", str(tmp_path / "theirs.json"), str(tmp_path / "ours.jsonl"), "--media-dir"]
    assert run("lmf-video", *words, str(tmp_path / "media")).returncode == 0
    assert json.loads((tmp_path / "ours.jsonl").read_text(encoding="utf-8"))["video"] == {
        "path": "deep/a.mp4",
        "start": 0.5,
    }
