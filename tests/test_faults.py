"""Faults found from outside, each with the right behaviour: keys, folders, chat, remote clips, hub tables, upgrades."""

import io
import json
import os
import threading
import time

import pytest
from conftest import write_clip
from llamafactory.hparams import get_train_args
from llamafactory_video.host.prompt import clip_of
from llamafactory_video.host.rows import LAYOUT
from llamafactory_video.records import table as loader
from llamafactory_video.records.clips import RecordKeys, decode_clip
from llamafactory_video.records.parse import parse_record
from llamafactory_video.records.report import DatasetError
from llamafactory_video.records.table import load_conversations
from llamafactory_video.video import cache, probe
from llamafactory_video.video import reader as clip
from llamafactory_video.video.probe import ClipError
from llamafactory_video.video.reader import ClipReader, spooled
from llamafactory_video.video.sampling import Sampling

SAMPLING = Sampling("qwen_finetune", fps=4, min_frames=2, max_frames=8, min_pixels=4096, max_pixels=10**8)


def parse(tmp_path, **keys):
    recipe = {
        "model_name_or_path": "Qwen/Qwen3-VL-4B-Instruct",
        "template": "qwen3_vl_video",
        "dataset": "clips",
        "output_dir": str(tmp_path / "out"),
        "stage": "sft",
        "do_train": True,
        "use_cpu": True,
        "report_to": "none",
    }
    return get_train_args({**recipe, **keys})


# --- After an upgrade ------------------------------------------------------------------------------------------------


def test_records_that_another_parser_made_are_read_anew(tmp_path, monkeypatch):
    """What an earlier release stored is not used: the key holds the code that makes records."""
    turns = [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns}]))

    def load():
        return load_conversations(
            tmp_path / "a.json", str(tmp_path), LAYOUT, cache_dir=str(tmp_path / "cache"), progress=False
        )

    assert load()[0]["_prompt"][0]["content"] == "问"
    parsed = []
    monkeypatch.setattr(loader, "parse_record", lambda *args: parsed.append(1) or parse_record(*args))
    loader.parse_record.__module__ = parse_record.__module__
    load()
    assert not parsed
    monkeypatch.setattr(loader, "code_digest", lambda *names: "a later release")
    load()
    assert parsed


def test_facts_and_frames_of_another_release_are_not_used(tmp_path, monkeypatch):
    file = str(write_clip(tmp_path / "a.mp4"))
    store = cache.FrameCache(tmp_path / "cache", 1 << 30)
    ClipReader(SAMPLING, store).read(file)
    assert store.read_file(file, probe.file_stamp(file)) is not None and store.size().clips == 1
    monkeypatch.setattr(cache, "code_digest", lambda *names: "a later release")
    assert store.read_file(file, probe.file_stamp(file)) is None
    ClipReader(SAMPLING, store).read(file)
    assert store.size().clips == 2


# --- Hub tables ------------------------------------------------------------------------------------------------------

HUMAN = {"from": "human", "value": "q"}
CALL = {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"conversations": [HUMAN, {"from": "gpt", "value": {"x": 1}}]}, "conversations, value of an answer,"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": [{"x": 1}]}]}, "conversations, value of an answer,"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": CALL}]}, "conversations, value of an answer,"),
        ({"tools": [{"name": "f"}], "conversations": [HUMAN, {"from": "gpt", "value": "a"}]}, "tools"),
        ({"conversations": "no list", "tools": None}, None),
        ({"conversations": ["no turn"]}, None),
        ({"tools": '[{"name": "f"}]', "conversations": [HUMAN, {"from": "gpt", "value": "a"}]}, None),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
                ]
            },
            None,
        ),
    ],
)
def test_objects_that_a_hubs_table_has_merged_are_refused(record, found):
    assert loader._merged_objects(record, RecordKeys()) == found


# --- Keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"video_timeout": "1e3"}, 'video_timeout must be a number above 0; found the text "1e3"; YAML reads 1e-6'),
        ({"video_timeout": 0}, "video_timeout must be a number above 0; found 0$"),
        (
            {"vision_tower_lr": "1e-6"},
            'vision_tower_lr must be a number of at least 0; found the text "1e-6"; YAML reads',
        ),
        ({"mm_projector_lr": float("nan")}, "mm_projector_lr must be a number of at least 0; found nan"),
        ({"video_fps": "4"}, 'video_fps must be a number; found the text "4"'),
        ({"video_max_frames": 8.5}, "video_max_frames must be a whole number; found 8.5"),
        ({"video_max_frames": True}, "video_max_frames must be a whole number; found true"),
        ({"video_cache": "no"}, 'video_cache must be true or false; found the text "no"'),
        ({"video_cache_dir": 7}, "video_cache_dir must be a text; found 7"),
        ({"video_remote_gb": -1}, "video_remote_gb must be a number above 0; found -1"),
        ({"answer_json_indent": "2"}, 'answer_json_indent must be a whole number of at least 0; found the text "2"'),
        ({"skip_wrong_records": 1}, "skip_wrong_records must be true or false; found 1"),
        (
            {"video_sampling": "qwen"},
            "video_sampling must be one of llamafactory, qwen_finetune, qwen_vl_utils; found",
        ),
        ({"model_name_or_path": ""}, "model_name_or_path is empty|Please provide `model_name_or_path`"),
        ({"stage": "dpo"}, "stage: dpo does not go with template qwen3_vl_video, which trains with `stage: sft`"),
        ({"stage": "pt"}, "stage: pt does not go with template qwen3_vl_video"),
    ],
)
def test_values_that_cannot_be_are_refused_with_what_would_be_right(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, **keys)


def test_a_folder_named_as_an_organisation_does_not_hide_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen").mkdir()
    assert parse(tmp_path)[0].model_name_or_path == "Qwen/Qwen3-VL-4B-Instruct"
    for gone in ("./Qwen/x", "output/gone", "a/b/c"):
        with pytest.raises(ValueError, match=f"no folder {gone}"):
            parse(tmp_path, model_name_or_path=gone)


def test_ranked_answers_are_refused_by_name(tmp_path):
    from types import SimpleNamespace

    from llamafactory.data import loader as stock
    from llamafactory.data.parser import DatasetAttr

    (tmp_path / "ranked.json").write_text("[]")
    attr = DatasetAttr("file", "ranked.json", formatting="video_conversation", ranking=True)
    with pytest.raises(
        DatasetError, match="ranked: a data set of formatting video_conversation has no chosen and rej"
    ):
        stock._load_single_dataset(attr, SimpleNamespace(), SimpleNamespace(), SimpleNamespace())


def test_fsdp_of_one_run_is_not_that_of_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    before = {name: value for name, value in os.environ.items() if "FSDP" in name}
    parse(tmp_path, fsdp="full_shard auto_wrap", fsdp_config={"fsdp_version": 2})
    assert os.environ["FSDP_VERSION"] == "2" and os.environ["ACCELERATE_USE_FSDP"] == "true"
    parse(tmp_path)
    assert {name: value for name, value in os.environ.items() if "FSDP" in name} == before


# --- Clips from outside ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"foo": 1}', "clip.foo: unknown setting"),
        ("{}", "exactly one of `path` and `frames` is needed"),
        ('{"path": 5}', "the path of a video is needed"),
        ('{"path": "a.mp4", "start": "x"}', "clip.start: .*a number is needed"),
    ],
)
def test_settings_typed_into_chat_are_checked(text, message):
    with pytest.raises(ValueError, match=message):
        decode_clip(text)
    with pytest.raises(ClipError, match=message):
        clip_of(text)


def test_a_path_that_begins_with_a_brace_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "{a.mp4")
    assert ClipReader(SAMPLING).plan("{a.mp4").plan.indices


class Response(io.RawIOBase):
    """The body of an answer that has come so far, as requests gives it: it cannot be read twice."""

    def __init__(self, data: bytes, wait: float = 0, each: int = 1 << 16) -> None:
        self.body, self.wait, self.each = io.BytesIO(data), wait, each

    def read(self, size=-1):
        time.sleep(self.wait)
        return self.body.read(min(self.each, size))


def test_a_remote_clip_is_read_within_bounds(tmp_path):
    data = write_clip(tmp_path / "a.mp4").read_bytes()
    reader = ClipReader(SAMPLING)
    assert reader.plan(Response(data)).plan == reader.plan(str(tmp_path / "a.mp4")).plan
    with pytest.raises(ClipError, match=r"the remote clip has more than video_remote_gb"):
        ClipReader(SAMPLING, remote=len(data) - 1).plan(Response(data))
    with pytest.raises(ClipError, match=r"took more than video_timeout, 0\.05 s, to arrive"):
        spooled(Response(data, wait=0.02, each=100), 1 << 30, 0.05)


def test_a_remote_clip_that_stops_arriving_is_left_behind(tmp_path):
    released = threading.Event()

    class Stuck(Response):
        def read(self, size=-1):
            released.wait(30)
            return b""

    with pytest.raises(ClipError, match="the remote clip hangs: nothing came within video_timeout"):
        ClipReader(SAMPLING, timeout=0.1).plan(Stuck(b""))
    released.set()


def test_packets_in_hand_are_shared_by_threads(tmp_path):
    """More files than are kept, read by several threads at once."""
    files = [str(write_clip(tmp_path / f"{i}.mp4", frames=3)) for i in range(12)]
    reader, errors = ClipReader(SAMPLING, timeout=None), []

    def read():
        try:
            for file in files * 5:
                reader.read(file)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(reader._packets) < len(files)


# --- Answers ---------------------------------------------------------------------------------------------------------


def test_what_an_answer_is_depends_on_its_value_not_on_its_fields_name():
    keys = RecordKeys(messages=("talk",), role=("who",), content=("words",))

    def answer(value):
        turns = [{"who": "user", "words": "q"}, {"who": "assistant", "words": value}]
        conversation, problems = parse_record({"talk": turns}, str, keys)
        assert not problems
        return conversation.messages[-1][1]

    assert answer([{"type": "text", "text": "甲"}, {"type": "text", "text": "乙"}]) == "甲乙"
    assert answer([{"type": "hero", "text": "甲"}]) == '[{"type": "hero", "text": "甲"}]'
    assert clip.as_clip("a.mp4").path == "a.mp4"


def test_a_step_without_a_supervised_token_has_the_loss_0():
    from types import SimpleNamespace

    import torch
    from llamafactory_video.train.trainer import VideoTrainer

    trainer = SimpleNamespace(args=SimpleNamespace(label_smoothing_factor=0.0), model=SimpleNamespace(training=True))
    trainer._by_tokens = True
    labels = torch.full((1, 4), -100)
    for count in (0, torch.tensor(0)):
        loss = VideoTrainer.token_loss(trainer, {"logits": torch.zeros(1, 4, 5)}, labels, count)
        assert loss.item() == 0
