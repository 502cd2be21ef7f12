"""`lmf-video infer` and `VideoModel`, against transformers' own way and against LLaMA-Factory's chat."""

import json
import shutil

import processes
import pytest
import torch
from conftest import write_clip
from llamafactory.chat import ChatModel
from llamafactory.train.tuner import run_exp
from llamafactory_video import Decoding, VideoModel, question
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.model.decoding import OutOfMemory
from llamafactory_video.prompt.shown import shown_text
from llamafactory_video.records.question import clip_argument, clip_files, read_questions
from peft import PeftModel
from PIL import Image
from test_contract import DIALECTS, LORA, recipe, where
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import load_video

SHORT = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A random model, clips of several lengths, a picture, and runs that trained it and an adapter."""
    folder = tmp_path_factory.mktemp("infer")
    save_tiny_model(folder / "model", hidden_size=32, layers=2, heads=2)
    for number in range(4):
        write_clip(folder / f"{number}.mp4", frames=10 + 9 * number, fps=10, size=(96, 128), seed=number)
    Image.effect_noise((96, 64), 60).convert("RGB").save(folder / "a.png")
    turns = [{"from": "human", "value": "<video>看"}, {"from": "gpt", "value": "好"}]
    (folder / "shown.json").write_text(json.dumps([{"video": "0.mp4", "conversations": turns}] * 2))
    info = {"shown": {"file_name": "shown.json", "formatting": "video_conversation"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    rates = {"learning_rate": 0.05}  # so that an adapter says something else than its model
    for kind, own in (("full", {}), ("lora", LORA)):
        keys = DIALECTS["qwen_finetune"] | rates | own
        run_exp(recipe(folder, video_sampling="qwen_finetune", output_dir=str(folder / kind), **keys))
    return folder


@pytest.fixture(scope="module")
def model(home):
    return VideoModel.load(str(home / "full"), video_cache=False)


def test_an_answer_is_that_of_plain_transformers(home, model):
    processor = AutoProcessor.from_pretrained(home / "full")
    plain = AutoModelForImageTextToText.from_pretrained(home / "full", dtype=torch.float32).eval()
    for number in range(4):
        content = [{"type": "video"}, {"type": "text", "text": "看"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        frames, metadata = load_video(
            str(home / f"{number}.mp4"),
            backend="pyav",
            sample_indices_fn=lambda metadata, **_: range(metadata.total_num_frames),
        )
        inputs = processor(text=[text], videos=[frames], video_metadata=[metadata], return_tensors="pt")
        ids = plain.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        expected = processor.batch_decode(ids, skip_special_tokens=True)[0]
        assert model.ask("看", video=home / f"{number}.mp4", decoding=SHORT) == expected != ""


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_answer_is_that_of_llamafactorys_chat(home, kind):
    keys = {
        "template": "qwen3_vl_video",
        "infer_backend": "huggingface",
        "video_cache": False,
        "infer_dtype": "float32",
    }
    chat = ChatModel({**where(home, home / kind, kind), **keys, "do_sample": False, "max_new_tokens": 12})
    said = chat.chat([{"role": "user", "content": "<video>看"}], videos=[str(home / "1.mp4")])
    expected = said[0].response_text
    asked = VideoModel.load(str(home / kind), video_cache=False, log=lambda _: None)
    assert asked.ask("<video>看", video=str(home / "1.mp4"), decoding=SHORT) == expected != ""
    if kind == "lora":
        named = VideoModel.load(str(home / "model"), str(home / kind), video_cache=False)
        assert named.encoder.reader.sampling == asked.encoder.reader.sampling
        assert named.ask("看", video=str(home / "1.mp4"), decoding=SHORT) == expected
        base = VideoModel.load(str(home / "model"), video_cache=False)
        assert base.ask("看", video=str(home / "1.mp4"), decoding=SHORT) != expected


def test_an_adapter_that_is_not_merged(home):
    """As beside a model in 4 bits."""
    merged = VideoModel.load(str(home / "model"), str(home / "lora"), video_cache=False)
    base = VideoModel.load(str(home / "model"), video_cache=False)
    beside = VideoModel(PeftModel.from_pretrained(base.model, home / "lora").eval(), merged.encoder)
    for number in range(3):
        clip = home / f"{number}.mp4"
        assert beside.ask("看", clip, decoding=SHORT) == merged.ask("看", clip, decoding=SHORT)


def questions(home):
    clips = [str(home / f"{number}.mp4") for number in range(4)]
    return [
        question("看", clips[3]),
        question("没有图"),
        question("<image>和<video>", clips[0], str(home / "a.png")),
        question("描述这个视频", clips[:2], system="只说实话"),
        question("看", {"path": clips[2], "start": 0.5, "end": 1.5, "fps": 8}),
        question(
            [
                {"role": "user", "content": "你好"},
                {"role": "assistant", "content": "好"},
                {"role": "user", "content": "再说"},
            ]
        ),
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_many_answers_are_those_of_each_alone(home, model, batch_size):
    asked = questions(home)
    alone = ["".join(model.stream(each, SHORT)) for each in asked]
    assert len(set(alone)) > 1
    found = dict(model.ask_many(asked, SHORT, batch_size))
    assert [found[number] for number in range(len(asked))] == alone


def test_a_clip_is_looked_at_once(home, model, monkeypatch):
    """However many questions and turns are about it, in one batch or later; and as if it were looked at each time."""
    seen = []
    look = model._seen._base.visual.forward
    fresh = VideoModel(model.model, model.encoder)  # takes the forward pass anew
    monkeypatch.setattr(
        fresh._seen._base.visual, "forward", lambda *args, flat: seen.append(len(flat["patches"])) or look(flat=flat)
    )
    first, second = (str(home / f"{number}.mp4") for number in (1, 2))
    asked = [question("看", first), question("再看", first), question("<image>和<video>", second, str(home / "a.png"))]
    expected = dict(model.ask_many(asked, SHORT))
    seen.clear()
    assert dict(fresh.ask_many(asked, SHORT)) == expected
    count = len(seen)
    assert count == 1
    turns = [
        {"role": "user", "content": "<video>看"},
        {"role": "assistant", "content": expected[0]},
        {"role": "user", "content": "还有吗"},
    ]
    fresh.ask(turns, video=first, decoding=SHORT)
    fresh.ask("<image><video>看", video=second, image=str(home / "a.png"), decoding=SHORT)
    assert len(seen) == count
    fresh.ask("看", video={"path": first, "fps": 9}, decoding=SHORT)  # other frames
    assert len(seen) == count + 1


def test_an_answer_ends_where_it_is_told_to(home, model):
    asked = questions(home)[3]
    loaded = [model.encoder.load(asked)]
    whole = model.answer(loaded, SHORT)[0]
    assert whole.prompt_tokens == len(loaded[0][0].ids)
    assert whole.tokens == 12 and not whole.is_whole
    stop = whole.text[2:4]
    ended = Decoding(max_new_tokens=12, stop=("没有这个", stop))
    short = model.answer(loaded, ended)[0]
    assert short.text == whole.text[: whole.text.index(stop)]
    assert short.is_whole and short.tokens < 12
    assert "".join(model.stream(asked, ended)) == short.text


def test_a_clip_that_cannot_be_read_is_an_answer_of_its_own(home, model, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes((home / "0.mp4").read_bytes()[:300])
    asked = [question("看", str(broken)), *questions(home)[:2]]
    found = dict(model.ask_many(asked, SHORT))
    assert isinstance(found[0], ValueError)
    assert "broken.mp4" in str(found[0])
    assert all(isinstance(found[number], str) for number in (1, 2))
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        model.ask("看", video=broken)
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        list(model.stream(asked[0]))


def test_fewer_at_once_where_memory_does_not_last(home, model, monkeypatch):
    sizes, said = [], []
    answer = VideoModel.answer

    def small(self, loaded, *args, **kwargs):
        sizes.append(len(loaded))
        if len(loaded) > 2:
            raise OutOfMemory("full")
        if any(len(sample.ids) > 60 for sample, _ in loaded):
            raise OutOfMemory("full")
        return answer(self, loaded, *args, **kwargs)

    monkeypatch.setattr(VideoModel, "answer", small)
    asked = questions(home)
    found = dict(model.ask_many(asked, SHORT, 6, said.append))
    assert sizes[:2] == [6, 3]
    too_long = {i for i, each in enumerate(asked) if len(model.encoder.encode(each).ids) > 60}
    assert {i for i, answer in found.items() if isinstance(answer, OutOfMemory)} == too_long != set()
    assert said[0] == "No memory for 6 questions at once; from here on there are 3."


def test_none_is_lost_where_memory_does_not_last(home, model, monkeypatch):
    """Over more questions than are sorted at once."""
    answer = VideoModel.answer

    def small(self, loaded, *args, **kwargs):
        if len(loaded) > 1:
            raise OutOfMemory("full")
        return answer(self, loaded, *args, **kwargs)

    asked = questions(home) * 3
    expected = dict(model.ask_many(asked, SHORT, 4))
    monkeypatch.setattr(VideoModel, "answer", small)
    monkeypatch.setattr("llamafactory_video.model.video_model._SORTED", 1)
    assert dict(model.ask_many(asked, SHORT, 4, lambda _: None)) == expected
    assert sorted(expected) == list(range(len(asked)))


def test_out_of_memory_says_what_to_lower_and_to_what(home, model, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.model, "generate", full)
    with pytest.raises(
        OutOfMemory,
        match=r"\d+ of them visual; lower video_max_pixels from (\d+) to \d+, or lower video_max_frames from 6 to 3",
    ):
        model.ask("看", video=home / "0.mp4")


def test_what_is_drawn_is_drawn_again_by_the_same_seed(home, model):
    asked = questions(home)[:3]
    drawn = [
        dict(model.ask_many(asked, Decoding(max_new_tokens=12, temperature=2.0, seed=seed))) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    # Of the likeliest token alone nothing is left to draw.
    assert dict(model.ask_many(asked, Decoding(max_new_tokens=12, temperature=2.0, top_k=1))) == dict(
        model.ask_many(asked, SHORT)
    )
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}, {"repetition_penalty": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; it must be"):
            Decoding(**wrong)


def test_a_reader_who_leaves_stops_the_answer(home, model):
    pieces = model.stream(questions(home)[0], Decoding(max_new_tokens=100_000))
    next(pieces)
    pieces.close()  # waits for the thread that writes


def test_folders_and_options_that_are_wrong(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def wrong(message, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            VideoModel.load(*args, **kwargs)

    wrong("no folder .*nowhere; give the folder of a model", str(home / "nowhere"))
    wrong("no folder .*nowhere", str(home / "model"), str(home / "nowhere"))
    wrong("has no adapter_config.json; an adapter's folder is needed", str(home / "model"), str(home / "full"))
    wrong("unknown option video_fpz; sampling has .*video_fps", str(home / "model"), video_fpz=2)
    wrong("Qwen/Qwen3-VL-4B-Instruct was not downloaded before, and HF_HUB_OFFLINE=1", "Qwen/Qwen3-VL-4B-Instruct")
    wrong("dtype is half; known are bfloat16", str(home / "model"), dtype="half")
    shutil.copytree(home / "lora", tmp_path / "alone")
    file = tmp_path / "alone/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/gone/model"}))
    wrong("alone is an adapter, and its model /gone/model is not here", str(tmp_path / "alone"))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    wrong("model_type bert is not supported; known are qwen3_vl", str(tmp_path / "bert"))
    (tmp_path / "empty").mkdir()
    wrong("empty: no model that can be loaded", str(tmp_path / "empty"))


def test_questions_that_are_wrong(home):
    clip = str(home / "0.mp4")
    for message, args in (
        ("no file gone.mp4", ("看", "gone.mp4")),
        ("1 video.s. and 2 <video>", ("<video><video>看", clip)),
        (r"holds <\|video_pad\|>", ("<|video_pad|>看",)),
        ("the last turn must be the user's", ([{"role": "assistant", "content": "好"}],)),
        ("unknown setting", ("看", {"path": clip, "fpz": 2})),
    ):
        with pytest.raises(ValueError, match=message):
            question(*args)


def test_clips_as_they_are_typed(tmp_path):
    assert clip_argument("a.mp4") == "a.mp4"
    assert clip_argument("a.mp4#12.5-20") == {"path": "a.mp4", "start": 12.5, "end": 20}
    assert clip_argument("a#b.mp4#3-") == {"path": "a#b.mp4", "start": 3}
    assert clip_argument("a.mp4#-20") == {"path": "a.mp4", "end": 20}
    (tmp_path / "b.mp4#1-2").touch()  # there may be such a file
    assert clip_argument(str(tmp_path / "b.mp4#1-2")) == str(tmp_path / "b.mp4#1-2")
    for name in ("b.MKV", "a.mp4", "c.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in clip_files(tmp_path)] == ["a.mp4", "b.MKV"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no video file in this folder; known endings are"):
        clip_files(tmp_path / "none")


def test_records_are_asked_without_their_last_answer(home):
    (home / "many.jsonl").write_text(
        "\n".join(
            json.dumps(record, ensure_ascii=False)
            for record in (
                {
                    "video": "0.mp4",
                    "conversations": [
                        {"from": "human", "value": "<video>看"},
                        {"from": "gpt", "value": {"标签": ["凯"]}},
                    ],
                },
                {"messages": [{"role": "user", "content": "问"}]},
                {"video": "gone.mp4", "conversations": [{"from": "human", "value": "<video>看"}]},
            )
        )
    )
    first, second, third = read_questions(home / "many.jsonl")
    assert first.label == {"标签": ["凯"]} and first.shown == (str(home / "0.mp4"),)
    assert first.conversation.messages[0] == ("user", "<video>看")
    assert second.label is None and second.conversation.messages[0] == ("user", "问")
    assert "gone.mp4" in str(third.conversation)
    assert isinstance(third.conversation, ValueError)


def test_what_is_shown_in_a_persons_words(home, model):
    """15 frames at 10 frames/s, of which 3 a second make 6; each is 96 x 128: 2 x 6 x 8 patches, of which 4 make a token."""
    write_clip(home / "six.mp4", frames=20, fps=10, size=(96, 128))
    encoder = model.encoder
    text = shown_text(encoder.encode(question("<image>看", str(home / "six.mp4"), str(home / "a.png"))), encoder)
    plan = encoder.reader.plan(str(home / "six.mp4")).plan
    assert plan.grid[0] == 3
    assert "  file      20 frames, 10 frames/s, 2.00 s, 128 x 96" in text
    assert f"  sampled   6 frames, at {' '.join(f'{time:.2f}' for time in plan.times)} s" in text
    assert f"  size      {plan.width} x {plan.height}" in text
    t, h, w = plan.grid
    assert f"  grid      {t} x {h} x {w} (time, height, width), {t * h * w} patches of 2 x 16 x 16 pixels" in text
    assert f"  tokens    {t * h * w // 4} visual, {h * w // 4} after each of <" in text
    assert "a.png\n  picture   96 x 64" in text


# --- The command ------------------------------------------------------------------------------------------------------


def infer(home, *words):
    return processes.run(
        "lmf-video", "infer", "--model", str(home / "full"), "--max-new-tokens", "6", *map(str, words)
    )


def test_one_question_in_the_terminal(home, model):
    result = infer(home, "--video", home / "1.mp4", "--prompt", "看", "--explain")
    assert result.returncode == 0, result.stderr
    expected = model.ask("看", video=home / "1.mp4", decoding=Decoding(max_new_tokens=6))
    assert result.stdout.endswith(f"\n{expected}\n")
    assert result.stdout.startswith(f"{home / '1.mp4'}\n  file      19 frames, 10 frames/s")
    result = infer(home, "--video", home / "1.mp4", "--prompt", "看", "--json")
    assert result.returncode == 1
    assert "this answer is not JSON" in result.stderr


def test_answers_in_a_file_and_on_from_where_they_stopped(home, tmp_path):
    out = tmp_path / "answers/all.jsonl"
    words = ["--video", home, home / "1.mp4#0.5-1.5", tmp_path / "gone.mp4", "--prompt", "看", "--out", out]
    result = infer(home, *words)
    assert result.returncode == 1
    assert "gone.mp4: no file" in result.stderr
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["source"] for line in lines[:2]] == [str(home / "0.mp4"), str(home / "1.mp4")]
    assert lines[-2]["source"] == f"{home / '1.mp4'}#0.5-1.5"
    assert [("answer" in line, "error" in line) for line in lines] == [(True, False)] * (len(lines) - 1) + [
        (False, True)
    ]
    # Killed while the third answer was written.
    text = out.read_text(encoding="utf-8").splitlines(keepends=True)
    marked = json.dumps({**lines[0], "answer": "这是以前的回答"}, ensure_ascii=False) + "\n"
    out.write_text(marked + text[1] + text[2][:40], encoding="utf-8")
    result = infer(home, *words)
    assert f"2 of {len(lines)} are answered in {out} already" in result.stderr
    again = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert again == [{**lines[0], "answer": "这是以前的回答"}, *lines[1:]]
    assert "这是以前的回答" in out.read_text(encoding="utf-8")
    result = infer(home, *words, "--temperature", "1")
    assert result.returncode == 1
    assert f"line 1: the answer to {home / '0.mp4'} is of another model, prompt or settings" in result.stderr
    result = infer(home, "--video", home / "0.mp4", "--prompt", "听", "--out", out)
    assert "is of another model, prompt or settings" in result.stderr
    # What this call does not ask about stays, and so does the order.
    assert infer(home, "--video", home / "1.mp4", "--prompt", "看", "--out", out).returncode == 0
    kept = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert kept == [again[0], *again[2:], again[1]]


def test_answers_to_records_have_their_labels(home, tmp_path):
    out = tmp_path / "all.jsonl"
    result = infer(home, "--data", home / "shown.json", "--out", out)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["label"] for line in lines] == ["好", "好"]
    assert lines[0]["shown"] == [str(home / "0.mp4")]
    assert "2 answers in" in result.stdout
    for words, message in (
        (["--data", home / "shown.json", "--prompt", "看"], "--data stands beside --prompt"),
        (["--video", home / "0.mp4"], "no question: give --prompt"),
        (["--prompt", "看", "--video", home / "gone.mp4"], "no file"),
        (["--prompt", "看", "--batch-size", "0"], "--batch-size is 0"),
    ):
        result = infer(home, *words)
        assert result.returncode == 1
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_a_model_that_was_quantized_before_keeps_how(home, monkeypatch):
    """Of AWQ, say: its config tells, and None in place of it would not."""
    from llamafactory_video.model import loading

    given = []
    stock = loading.AutoModelForImageTextToText.from_pretrained
    monkeypatch.setattr(
        loading.AutoModelForImageTextToText,
        "from_pretrained",
        lambda *a, **keys: given.append(keys) or stock(*a, **keys),
    )
    loading.load_model(str(home / "model"), device="cpu", log=lambda _: None)
    assert "quantization_config" not in given[0]
