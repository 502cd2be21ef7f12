"""Answers held to a JSON Schema: of models that know nothing, and of one that would have kept to it anyway."""

import json
import re

import pytest
import torch
from conftest import write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from llamafactory.chat import ChatModel
from llamafactory_video import Decoding, VideoModel, question
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.model.constrained import Grammars, JsonAnswers, SchemaError
from llamafactory_video.records.json_text import read_json
from llamafactory_video.records.schema import check_schema, read_schema, schema_of_answers
from test_infer import infer
from transformers import AutoTokenizer

TAGS = {
    "type": "object",
    "properties": {
        "video_description": {"type": "string"},
        "tags": {"type": "array", "items": {"enum": ["王者荣耀", "凯", "李白"]}},
    },
    "required": ["video_description", "tags"],
    "additionalProperties": False,
}
SCHEMAS = {
    "tags": TAGS,
    "any": {},
    "any object": {"type": "object"},
    "numbers": {"type": "array", "items": {"type": "number", "minimum": -5}, "minItems": 2, "maxItems": 4},
    "a range": {"type": "number", "exclusiveMinimum": 0.25, "exclusiveMaximum": 0.5},
    "whole numbers": {"type": "array", "items": {"type": "integer", "minimum": 70, "maximum": 99}, "minItems": 1},
    "strings of a length": {
        "type": "object",
        "properties": {"a": {"type": "string", "minLength": 5}},
        "required": ["a"],
    },
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "名字": {"enum": ["一个很长很长的名字", "短"]},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                },
                "required": ["名字"],
            }
        },
    },
    "either": {"anyOf": [{"type": "integer"}, {"type": "object", "properties": {"x": TAGS}, "required": ["x"]}]},
    "nullable": {"type": "object", "properties": {"a": {"type": ["string", "null", "boolean"]}}, "required": ["a"]},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schema")
    save_tiny_model(folder / "full", hidden_size=32, layers=1, heads=2)
    write_clip(folder / "1.mp4", frames=12, fps=10, size=(64, 64))
    return folder


@pytest.fixture(scope="module")
def grammars(home):
    tokenizer = AutoTokenizer.from_pretrained(home / "full")
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")]
    return tokenizer, ends, Grammars(tokenizer, ends)


def write(grammars, schema, room, seed, rows=3):
    """Answers of a model that draws each token evenly."""
    tokenizer, ends, known = grammars
    grammar = known.of(schema)
    held = JsonAnswers([grammar] * rows, room)
    draw = torch.Generator().manual_seed(seed)
    ids, ended = torch.zeros((rows, 2), dtype=torch.long), [False] * rows
    for _ in range(room):
        scores = torch.randn((rows, len(tokenizer) + 7), generator=draw)  # a model may have more rows than tokens
        token = held(ids, scores).argmax(1)
        token[torch.tensor(ended)] = tokenizer.pad_token_id
        ids = torch.cat([ids, token[:, None]], 1)
        ended = [before or int(each) in ends for before, each in zip(ended, token, strict=True)]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in ids[:, 2:]]


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), more=st.integers(0, 90))
def test_whatever_is_drawn_is_json_of_the_schema_and_fits(grammars, schema, seed, more):
    room = grammars[2].of(schema).shortest + more
    for text in write(grammars, schema, room, seed):
        assert not read_json(text)[1], text
        assert Draft202012Validator(schema).is_valid(json.loads(text)), text
        assert not re.search(r"(?<!\\)(\\\\)*\\u", text), text


def test_white_space_has_an_end(grammars):
    """Of a model that would rather say something else, it is the only thing that it is always allowed to write."""
    tokenizer, _, known = grammars
    blank = {i for i in range(len(tokenizer)) if tokenizer.decode([i]).isspace()}
    held = JsonAnswers([known.of(TAGS)], 400)
    ids, text = torch.zeros((1, 1), dtype=torch.long), ""
    for _ in range(120):
        scores = torch.zeros((1, len(tokenizer)))
        scores[0, list(blank)] = 1
        token = held(ids, scores).argmax(1)
        text += tokenizer.decode(token)
        ids = torch.cat([ids, token[:, None]], 1)
    assert '"video_description"' in text


def test_rows_of_a_batch_are_held_each_to_its_own(grammars):
    tokenizer, _, known = grammars
    held = JsonAnswers([None, known.of(TAGS)], 40)
    scores = torch.zeros((2, len(tokenizer)))
    kept = held(torch.zeros((2, 3), dtype=torch.long), scores)
    assert torch.equal(kept[0], scores[0])
    allowed = {tokenizer.decode([i]) for i in (kept[1] == 0).nonzero().flatten()}
    assert "{" in allowed
    assert all(text.strip() in ("", "{", '{"') for text in allowed)


def test_a_right_answer_is_not_changed(grammars):
    """However its author spaced it, the likeliest token is allowed at each place."""
    tokenizer, ends, known = grammars
    answer = {"video_description": '主播说"好"，\n走了', "tags": ["凯", "王者荣耀"]}
    for text in (json.dumps(answer, ensure_ascii=False, indent=indent) for indent in (None, 2)):
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], ends[0]]
        held = JsonAnswers([known.of(TAGS)], len(ids) + 200)
        written = torch.zeros((1, 1), dtype=torch.long)
        for token in ids:
            scores = torch.zeros((1, len(tokenizer)))
            scores[0, token] = 1
            assert held(written, scores).argmax() == token, tokenizer.decode(written[0])
            written = torch.cat([written, torch.tensor([[token]])], 1)


def test_an_untrained_model_answers_in_json(home):
    model = VideoModel.load(str(home / "full"), video_cache=False)
    asked = [question("看", str(home / "1.mp4")), question("只有文字，没有视频"), question("短")]
    for temperature in (0, 1.5):
        decoding = Decoding(max_new_tokens=60, temperature=temperature, schema=TAGS, seed=3)
        for _, answer in model.ask_many(asked, decoding):
            Draft202012Validator(TAGS).validate(json.loads(answer))
        streamed = "".join(model.stream(asked[0], decoding))
        Draft202012Validator(TAGS).validate(json.loads(streamed))


def test_schemas_that_cannot_be_kept_to(grammars, home):
    _, _, known = grammars
    for schema, message in (
        ({"type": "array", "uniqueItems": True}, "cannot be held to this JSON Schema: .*uniqueItems"),
        ({"$ref": "http://elsewhere/schema.json"}, "cannot be held to this JSON Schema"),
        ({"allOf": [{"type": "string"}, {"type": "number"}]}, "cannot be held to this JSON Schema|found no answer"),
    ):
        with pytest.raises(SchemaError, match=message):
            known.of(schema)
    with pytest.raises(SchemaError, match=r"max_new_tokens is 3; the shortest answer of this JSON Schema has \d\d"):
        JsonAnswers([known.of(TAGS)], 3)
    with pytest.raises(ValueError, match="properties.a.type: 'strnig' is not valid"):
        check_schema({"properties": {"a": {"type": "strnig"}}}, "s.json")
    with pytest.raises(ValueError, match=r"no file .*gone"):
        read_schema(home / "gone.json")
    (home / "wrong.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="wrong.json: not JSON"):
        read_schema(home / "wrong.json")
    (home / "list.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="a JSON Schema is an object; this is"):
        read_schema(home / "list.json")


# --- Schemas told from answers ----------------------------------------------------------------------------------------


def write_answers(file, answers):
    turns = [
        [{"from": "human", "value": "问"}, {"from": "gpt", "value": answer}] if answer is not None else []
        for answer in answers
    ]
    file.write_text(json.dumps([{"conversations": each} for each in turns if each], ensure_ascii=False))
    return file


def test_a_schema_told_from_answers(tmp_path):
    answers = [
        {"描述": "好", "tags": ["凯", "李白"], "n": 1, "heroes": [{"name": "凯", "kills": 2}], "note": "无"},
        '{"描述": "坏", "tags": [], "n": 2.5, "heroes": []}',
    ]
    file = write_answers(tmp_path / "a.json", answers)
    schema = schema_of_answers(file, ["tags", "heroes.name"])
    assert schema == {
        "type": "object",
        "properties": {
            "描述": {"type": "string"},
            "tags": {"type": "array", "items": {"enum": ["凯", "李白"]}},
            "n": {"type": "number"},
            "heroes": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"name": {"enum": ["凯"]}, "kills": {"type": "integer"}},
                    "required": ["kills", "name"],
                    "additionalProperties": False,
                },
            },
            "note": {"type": "string"},
        },
        "required": schema["required"],
        "additionalProperties": False,
    }
    assert set(schema["required"]) == {"描述", "tags", "n", "heroes"}
    assert list(schema["properties"]) == ["描述", "tags", "n", "heroes", "note"]  # answers are written in this order
    for answer in answers:
        value = json.loads(answer) if isinstance(answer, str) else answer
        Draft202012Validator(schema).validate(value)
    mixed = write_answers(tmp_path / "m.json", [{"a": "x"}, {"a": None}, {"a": "y"}])
    assert schema_of_answers(mixed, ["a"])["properties"]["a"] == {"anyOf": [{"enum": ["x", "y"]}, {"type": ["null"]}]}


def test_answers_that_tell_no_schema(tmp_path):
    file = write_answers(tmp_path / "a.json", [{"a": {"b": 1}}])
    with pytest.raises(ValueError, match=r"no answer has a text, .* in the field tags; fields are a, a\.b"):
        schema_of_answers(file, ["tags"])
    file = write_answers(tmp_path / "t.json", [{"a": 1}, "就是一句话"])
    with pytest.raises(ValueError, match=r"t\.json.*2.*: its answer is not JSON"):
        schema_of_answers(file)
    (tmp_path / "q.json").write_text('[{"conversations": [{"from": "human", "value": "问"}]}]')
    with pytest.raises(ValueError, match="no record has an answer"):
        schema_of_answers(tmp_path / "q.json")


def test_the_command(home):
    (home / "schema.json").write_text(json.dumps(TAGS, ensure_ascii=False), encoding="utf-8")
    clip = ["--video", home / "1.mp4", "--prompt", "看", "--max-new-tokens", "60"]
    result = infer(home, *clip, "--schema", home / "schema.json", "--json")
    assert result.returncode == 0, result.stderr
    Draft202012Validator(TAGS).validate(json.loads(result.stdout))
    data = write_answers(home / "answers.json", [{"标签": ["王者荣耀"]}])
    result = infer(home, *clip, "--schema-from", data, "--schema-vocabulary", "标签")
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)["标签"]) <= {"王者荣耀"}
    for words, message in (
        (["--schema", home / "schema.json", "--schema-from", data], "--schema stands beside --schema-from"),
        (["--schema-vocabulary", "标签"], "--schema-vocabulary needs --schema-from"),
        (["--schema", home / "schema.json", "--max-new-tokens", "4"], "max_new_tokens is 4; the shortest answer"),
    ):
        result = infer(home, *clip, *words)
        assert result.returncode == 1
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_llamafactorys_chat_is_held_to_the_recipes_schema(home):
    (home / "chat.json").write_text(json.dumps(TAGS, ensure_ascii=False), encoding="utf-8")
    keys = {"model_name_or_path": str(home / "full"), "template": "qwen3_vl_video", "infer_backend": "huggingface"}
    keys |= {"video_cache": False, "max_new_tokens": 50}
    chat = ChatModel({**keys, "json_schema": str(home / "chat.json"), "do_sample": True, "temperature": 1.5})
    for said in (
        chat.chat([{"role": "user", "content": "<video>看"}], videos=[str(home / "1.mp4")])[0].response_text,
        "".join(chat.stream_chat([{"role": "user", "content": "说"}])),
    ):
        Draft202012Validator(TAGS).validate(json.loads(said))
    for wrong, message in (
        ({"json_schema": str(home / "gone.json")}, "no file .*gone.json"),
        ({"json_schema": str(home / "chat.json"), "json_schema_from": "x.json"}, "json_schema stands beside"),
        ({"json_schema_vocabulary": "tags"}, "json_schema_vocabulary needs json_schema_from"),
        ({"num_beams": 4}, "num_beams is 4"),
    ):
        with pytest.raises(ValueError, match=message):
            ChatModel({**keys, **wrong})
