"""`lmf-video eval` and `score`: whole, with small models, and on answers whose worth is known."""

import json
import random
import shutil
import time

import pytest
from conftest import write_clip
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.evaluate.report import Example, fallen, make_report, recording_of, table
from processes import JsonHandler, run, served

TAGS = ["团战", "推塔", "打龙", "击杀", "对线", "回城"]


def text(answer):
    return json.dumps(answer, ensure_ascii=False)


def made_up(count, per_source, share_right, seed):
    """Examples of several clips a recording, and answers of which about that share of tags is right."""
    draw = random.Random(seed)
    examples, answers = [], []
    for i in range(count):
        tags = draw.sample(TAGS, 2)
        said = [tag if draw.random() < share_right else draw.choice(TAGS) for tag in tags]
        clip = f"录像{i // per_source}/{i}.mp4"
        examples.append(Example(f"记录 {i}", (clip,), {"tags": tags, "scene": "王者峡谷"}, "<video>看"))
        answers.append(text({"tags": said, "scene": "王者峡谷"}))
    return examples, answers


def lines(examples, answers):
    return "\n".join(
        text({"source": e.source, "shown": e.clips, "answer": a, "label": e.label})
        for e, a in zip(examples, answers, strict=True)
    )


def test_a_better_model_is_called_better_and_an_equal_one_is_not():
    examples, poor = made_up(200, 1, 0.3, 1)
    _, good = made_up(200, 1, 0.3, 1)
    good = [text(e.label) if i % 2 else a for i, (e, a) in enumerate(zip(examples, good, strict=True))]
    report = make_report(examples, {"base": poor, "tuned": good}).value
    assert report["verdict"].startswith("tuned is better than base: score ") and "p < 0.001" in report["verdict"]
    found = report["differences"]["tuned"]["tags.f1"]
    assert found["low"] > 0 and found["value"] == pytest.approx(
        report["models"]["tuned"]["tags.f1"]["value"] - report["models"]["base"]["tags.f1"]["value"], abs=1e-6
    )
    assert not fallen(report, "tuned")
    turned = make_report(examples, {"tuned": good, "base": poor}).value
    assert {"tags.f1", "tags.recall", "score"} <= fallen(turned, "base").keys()
    alike = make_report(examples, {"a": poor, "b": list(poor)}).value
    assert "differ by no more than chance" in alike["verdict"] and not fallen(alike, "b")


def test_chance_opens_no_gate_and_closes_none():
    """Of 60 pairs of models that are equally good, the gate closes for at most a few."""
    closed = 0
    for seed in range(60):
        examples, _ = made_up(60, 1, 0.6, seed)
        draw = random.Random(seed + 1000)
        second = [
            text(
                {
                    "tags": [t if draw.random() < 0.6 else draw.choice(TAGS) for t in e.label["tags"]],
                    "scene": "王者峡谷",
                }
            )
            for e in examples
        ]
        first = [
            text(
                {
                    "tags": [t if draw.random() < 0.6 else draw.choice(TAGS) for t in e.label["tags"]],
                    "scene": "王者峡谷",
                }
            )
            for e in examples
        ]
        closed += bool(fallen(make_report(examples, {"a": first, "b": second}).value, "b"))
    assert closed <= 6


def test_clips_of_one_recording_are_one_source():
    file, folder, pattern = recording_of("file"), recording_of("folder"), recording_of(r"match(\d+)")
    clips = ["a/match7/1.mp4 from 3 s to 5 s"]
    assert (file(clips), folder(clips), pattern(clips)) == ("a/match7/1.mp4", "a/match7", "7")
    assert file(["b.mp4#1.5-3"]) == "b.mp4" and file([]) == "" and pattern(["x.mp4"]) == "x.mp4"
    listed = recording_of({"match7/1.mp4": "决赛", "b.mp4": "B"})
    assert [listed([name]) for name in ("/data/match7/1.mp4", "x/b.mp4 from 1 s to …", "c.mp4")] == [
        "决赛",
        "B",
        "c.mp4",
    ]
    with pytest.raises(ValueError, match="is no regular expression"):
        recording_of("(")
    examples, answers = made_up(100, 10, 0.5, 2)
    by_file = make_report(examples, {"m": answers}).value
    by_folder = make_report(examples, {"m": answers}, source="folder").value
    assert (by_file["source_videos"], by_folder["source_videos"]) == (100, 10)
    assert by_folder["models"]["m"]["score"]["value"] == by_file["models"]["m"]["score"]["value"]


def test_slices_and_confusions_by_hand():
    examples = [
        Example(str(i), (f"{i}.mp4",), {"tags": tags}) for i, tags in enumerate([["团战"], ["推塔"], ["团战", "推塔"]])
    ]
    answers = [text({"tags": tags}) for tags in (["团战"], ["打龙"], ["团战", "打龙"])]
    report = make_report(examples, {"m": answers}, by="tags").value
    assert report["by"]["values"]["团战"]["records"] == 2
    assert report["by"]["values"]["推塔"]["models"]["m"]["value"] == 0.25
    assert report["confusions"]["m"]["tags"] == [["推塔", "打龙", 2.0]]
    assert report["tags"]["m"]["tags"]["推塔"] == {"f1": 0.0, "precision": None, "recall": 0.0, "right": 2, "said": 0}
    with pytest.raises(ValueError, match="no right answer has a field hero of texts or numbers; it has tags"):
        make_report(examples, {"m": answers}, by="hero")


def test_the_table_stands_in_columns_with_chinese_names():
    examples, answers = made_up(20, 1, 0.5, 3)
    examples = [Example(e.source, e.clips, {"标签": e.label["tags"]}) for e in examples]
    answers = [text({"标签": json.loads(a)["tags"]}) for a in answers]
    shown = table(make_report(examples, {"前": answers, "后": answers}).value).splitlines()
    assert shown[0].split() == ["前", "后", "后", "-", "前"] and any("标签.f1" in line for line in shown)

    def column(line):
        return sum(2 if ord(c) > 255 else 1 for c in line[: line.index("(")])

    assert len({column(line) for line in shown if "(" in line}) == 1


def test_a_thousand_records_of_two_models_are_judged_in_a_minute():
    examples, first = made_up(1000, 4, 0.5, 4)
    _, second = made_up(1000, 4, 0.6, 4)
    about = "双方在中路僵持了很久，凯绕到敌方身后偷掉了二塔，全队随后压上高地，一波结束了比赛。"
    examples = [Example(e.source, e.clips, {**e.label, "about": about}) for e in examples]
    answers = {
        name: [text({**json.loads(a), "about": about[: 5 + i % 30]}) for i, a in enumerate(said)]
        for name, said in (("a", first), ("b", second))
    }
    began = time.process_time()  # of this process, so that others do not count
    report = make_report(examples, answers, by="tags").value
    assert time.process_time() - began < 60
    assert report["records"] == 1000 and list(report["models"]) == ["a", "b"]


def test_the_gate(tmp_path):
    examples, good = made_up(120, 1, 0.9, 5)
    _, bad = made_up(120, 1, 0.2, 6)
    for name, said in (("good", good), ("bad", bad)):
        (tmp_path / f"{name}.jsonl").write_text(lines(examples, said), encoding="utf-8")
    words = ["lmf-video", "score", f"{tmp_path}/good.jsonl", "--out", str(tmp_path / "before")]
    assert run(*words).returncode == 0
    again = run(*words, "--gate", str(tmp_path / "before/report.json"))
    assert again.returncode == 0 and "gate: open (120 records compared" in again.stderr
    worse = run(
        "lmf-video", "score", f"{tmp_path}/bad.jsonl", "--out", str(tmp_path / "x"), "--gate", str(tmp_path / "before")
    )
    assert worse.returncode == 1 and "gate: tags.f1 of bad is " in worse.stderr and "gate: closed" in worse.stderr
    wrong = run(*words, "--gate", str(tmp_path / "gone.json"))
    assert wrong.returncode == 1 and "needs to be a report.json with its records.jsonl beside it" in wrong.stderr


def test_predictions_of_llamafactory_are_scored(tmp_path):
    rows = [
        {"prompt": "看", "predict": text({"a": 1}), "label": text({"a": 1}) + "\n"},
        {"prompt": "看", "predict": "{", "label": text({"a": 2}), "clips": ["1.mp4"]},
    ]
    file = tmp_path / "generated_predictions.jsonl"
    file.write_text("\n".join(map(text, rows)), encoding="utf-8")
    (tmp_path / "sources.json").write_text('{"1.mp4": "A"}')
    words = ["lmf-video", "score", f"run={file}", "--out", str(tmp_path / "out"), "--source"]
    told = run(*words, str(tmp_path / "sources.json"))
    assert told.returncode == 0 and "run scores 0.500" in told.stdout
    for content, message in (("{", "not JSON"), ("[1]", "an object is needed")):
        (tmp_path / "wrong.json").write_text(content)
        wrong = run(*words, str(tmp_path / "wrong.json"))
        assert wrong.returncode == 1 and message in wrong.stderr
    kept = [json.loads(line) for line in (tmp_path / "out/records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kept[0]["scores"] == {"run": 1.0} and kept[1]["clips"] == ["1.mp4"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no answers in it"),
        ("{", "line 1: not JSON"),
        ('{"text": 1}', "line 1: no answer; `answer` or `predict` is needed"),
        ('{"answer": "x"}', "line 1: no label"),
    ],
)
def test_files_that_hold_no_answers_are_named(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    told = run("lmf-video", "score", str(tmp_path / "x.jsonl"))
    assert told.returncode == 1 and message in told.stderr and "Traceback" not in told.stderr


def test_models_are_asked_judged_and_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = []
    for i in range(3):
        write_clip(tmp_path / f"media/{i}.mp4", frames=8, seed=i)
        turns = [{"from": "human", "value": "<video>看"}, {"from": "gpt", "value": {"tags": TAGS[i : i + 2]}}]
        records.append({"video": f"{i}.mp4", "conversations": turns})
    (tmp_path / "dataset_info").mkdir()
    (tmp_path / "dataset_info/test.json").write_text(json.dumps(records), encoding="utf-8")
    info = {"mine": {"file_name": "test.json", "formatting": "video_conversation"}}
    (tmp_path / "dataset_info/dataset_info.json").write_text(json.dumps(info))
    for seed, name in enumerate(("base", "tuned")):
        save_tiny_model(tmp_path / name, seed=seed, hidden_size=32, layers=1, heads=2)
    right = [
        text({"source": f"dataset_info/test.json, record {i + 1} (line 1)", "answer": text({"tags": TAGS[i : i + 2]})})
        for i in range(3)
    ]
    (tmp_path / "right.jsonl").write_text("\n".join(right), encoding="utf-8")
    words = ["lmf-video", "eval", "mine", "--media-dir", "media", "--max-new-tokens", "4", "--out", "out"]
    models = ["--model", "base", "--model", "new=tuned", "--answers", "right.jsonl"]
    first = run(*words, *models, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert first.returncode == 0, first.stderr[-3000:]
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert list(report["models"]) == ["right", "base", "new"] and report["records"] == 3
    assert report["models"]["right"]["tags.f1"]["value"] == 1.0
    kept = [json.loads(line) for line in (tmp_path / "out/records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kept[0]["prompt"] == "<video>看" and kept[0]["label"] == {"tags": TAGS[:2]}
    assert set(kept[0]["answers"]) == {"right", "base", "new"} and "0.mp4" in kept[0]["clips"][0]
    again = run(*words, *models, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert again.stderr.count("3 of 3 are answered in out/answers/") == 2 and "questions in" not in again.stderr
    assert json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8")) == report
    elsewhere = run(
        "lmf-video", "eval", str(tmp_path / "dataset_info/test.json"), *words[3:], "--answers", "right.jsonl"
    )
    assert elsewhere.returncode == 0 and "right scores 1.000" in elsewhere.stdout, elsewhere.stderr
    save_tiny_model(tmp_path / "again", seed=7, hidden_size=32, layers=1, heads=2)
    shutil.rmtree(tmp_path / "tuned")
    (tmp_path / "again").rename(tmp_path / "tuned")  # as if it had been trained again
    anew = run(*words, *models, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert anew.returncode == 0 and anew.stderr.count("3 of 3 are answered") == 1, anew.stderr[-2000:]
    limited = run(*words, "--answers", "right.jsonl", "--limit", "2")
    assert limited.returncode == 0 and "2 records of 2 source videos" in limited.stdout
    for extra, message in (
        (["--model", "base", "--model", "x=base", "--answers", "base=right.jsonl"], "two models are called base"),
        ([], "nothing to judge: give --model or --answers"),
        (["--answers", "gone.jsonl"], "no file gone.jsonl"),
    ):
        told = run(*words, *extra)
        assert told.returncode == 1 and message in told.stderr
    assert "nor is it the name of a data set in" in run("lmf-video", "eval", "nothing", "--model", "base").stderr


def test_a_model_behind_an_address_answers_as_its_folder_does(tmp_path, monkeypatch):
    """By this project's own server, over HTTP; with parts of clips and pictures, and a server that refuses."""
    import threading

    import uvicorn
    from llamafactory_video import VideoModel
    from llamafactory_video.serve.app import Settings, create_app
    from PIL import Image

    save_tiny_model(tmp_path / "model", hidden_size=32, layers=1, heads=2)
    write_clip(tmp_path / "0.mp4", frames=24)
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "a.png")
    records = [
        {
            "video": {"path": "0.mp4", "start": 1.0, "fps": 2},
            "conversations": [{"from": "human", "value": "<video>看"}],
        },
        {"image": "a.png", "system": "说", "conversations": [{"from": "human", "value": "图：<image>"}]},
        {
            "video": "0.mp4",
            "conversations": [
                {"from": "human", "value": "<video>看"},
                {"from": "gpt", "value": "塔"},
                {"from": "human", "value": "再看"},
            ],
        },
    ]
    for record in records:
        record["conversations"].append({"from": "gpt", "value": {"tags": ["团战"]}})
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    model = VideoModel.load(str(tmp_path / "model"), video_cache=False)
    config = uvicorn.Config(create_app(model, Settings("mine")), port=0, log_level="error")
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        words = [
            "lmf-video",
            "eval",
            str(tmp_path / "data.json"),
            "--max-new-tokens",
            "6",
            "--out",
            str(tmp_path / "out"),
        ]
        models = ["--model", f"here={tmp_path}/model", "--model", f"there=http://127.0.0.1:{port}/v1"]
        told = run(*words, *models, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert told.returncode == 0, told.stderr[-3000:]
        kept = [json.loads(line) for line in (tmp_path / "out/records.jsonl").read_text(encoding="utf-8").splitlines()]
        assert all(line["answers"]["here"] == line["answers"]["there"] and line["answers"]["here"] for line in kept)
        (tmp_path / "0.mp4").write_bytes(b"no video")
        again = run(*words, "--model", f"x=http://127.0.0.1:{port}/v1#mine")
        assert "answers with status 400: " in again.stderr and "2 questions have none" in again.stdout
    finally:
        server.should_exit = True


def test_a_judge_is_asked_once_about_each_text(tmp_path):
    """A server of OpenAI's form that thinks more of longer texts."""
    asked = []

    class Judge(JsonHandler):
        def do_GET(self):
            self.send({"data": [{"id": "judge"}]})

        def do_POST(self):
            body = json.loads(self.body())
            asked.append(body["messages"][0]["content"][0]["text"])
            opinion = (
                "不知道"
                if "吞" in asked[-1]
                else "9"
                if "一波结束了比赛" in asked[-1].split("Second:")[1]
                else "I say 4."
            )
            self.send({"choices": [{"message": {"content": opinion}}]})

    about = "双方在中路僵持了很久，凯绕到敌方身后偷掉了二塔，全队随后压上高地，一波结束了比赛。"
    examples = [Example(str(i), (f"{i}.mp4",), {"about": about}) for i in range(3)]
    answers = [text({"about": said}) for said in (about, about[:20])] + ["{"]
    (tmp_path / "a.jsonl").write_text(lines(examples, answers), encoding="utf-8")
    words = ["lmf-video", "score", f"{tmp_path}/a.jsonl", "--out", str(tmp_path / "out"), "--judge"]
    with served(Judge) as server:
        address = f"{server}/v1"
        for _ in range(2):
            told = run(*words, address)
            assert told.returncode == 0, told.stderr[-2000:]
            report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
            assert report["models"]["a"]["about.judge"]["value"] == pytest.approx((0.9 + 0.4 + 0) / 3, abs=1e-6)
            assert len(asked) == 2
        (tmp_path / "a.jsonl").write_text(lines(examples, [text({"about": "吞" * 30})] * 3), encoding="utf-8")
        told = run(*words, address)
        assert told.returncode == 1 and "--judge: a number from 0 to 10 was asked for" in told.stderr


def test_clips_that_were_trained_on_are_refused(tmp_path):
    """The same recording, the same file under another name, and the same pictures in another file, but no others."""
    import av
    from conftest import decode_all

    def record(name):
        turns = [{"from": "human", "value": "<video>看"}, {"from": "gpt", "value": {"tags": ["团战"]}}]
        return {"video": name, "conversations": turns}

    for i in range(4):
        write_clip(tmp_path / f"train/match{i}/a.mp4", frames=24, size=(96, 128), seed=i)
    for i in range(3):
        write_clip(tmp_path / f"test/new{i}/a.mp4", frames=24, size=(96, 128), seed=50 + i)
    write_clip(tmp_path / "test/match1/other.mp4", frames=24, size=(96, 128), seed=60)
    (tmp_path / "test/copy.mp4").write_bytes((tmp_path / "train/match2/a.mp4").read_bytes())
    frames = decode_all(tmp_path / "train/match3/a.mp4")
    with av.open(str(tmp_path / "test/again.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=6, options={"crf": "30"})
        stream.height, stream.width, stream.pix_fmt = 72, 96, "yuv420p"
        for frame in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(width=96, height=72))
            )
        container.mux(stream.encode())
    names = ["new0/a.mp4", "new1/a.mp4", "new2/a.mp4", "match1/other.mp4", "copy.mp4", "again.mkv"]
    (tmp_path / "test/test.json").write_text(json.dumps(list(map(record, names))), encoding="utf-8")
    trained = [record(f"match{i}/a.mp4") for i in range(4)]
    (tmp_path / "train/train.json").write_text(json.dumps(trained), encoding="utf-8")
    answers = [
        text({"source": f"{tmp_path}/test/test.json, record {i + 1} (line 1)", "answer": "{}"}) for i in range(6)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(answers), encoding="utf-8")
    words = [
        "lmf-video",
        "eval",
        f"{tmp_path}/test/test.json",
        "--answers",
        f"{tmp_path}/a.jsonl",
        "--out",
        f"{tmp_path}/out",
    ]
    told = run(*words, "--trained-on", f"{tmp_path}/train/train.json", "--source", r"(match\d+|new\d+)")
    assert told.returncode == 1 and "3 of 6 clips would not tell" in told.stderr, told.stderr
    for part in (
        "match1/other.mp4 is of the same recording as ",
        "copy.mp4 is the same file as ",
        "again.mkv looks like ",
    ):
        assert part in told.stderr
    assert "/new" not in told.stderr.split("would not tell")[1].split("Take them out")[0]
    without = run(*words, "--trained-on", f"{tmp_path}/train/train.json", "--no-near")
    assert "1 of 6 clips would not tell" in without.stderr
    allowed = run(*words, "--trained-on", f"{tmp_path}/train/train.json", "--allow-overlap")
    assert allowed.returncode == 0, allowed.stderr
    # What a run of ours was trained on is known by its folder.
    (tmp_path / "model").mkdir()
    (tmp_path / "train/dataset_info.json").write_text(json.dumps({"mine": {"file_name": "train.json"}}))
    recipe = {"dataset": "mine,gone", "dataset_dir": str(tmp_path / "train")}
    (tmp_path / "model/run.json").write_text(json.dumps({"recipe": recipe}))
    told = run(*words, "--model", str(tmp_path / "model"), "--no-near")
    assert "copy.mp4 is the same file as " in told.stderr and "was trained on gone, which is not here" in told.stderr


def test_a_task_of_lmms_eval_asks_and_judges_as_we_do(tmp_path):
    """Its functions, run as lmms-eval runs them: the same questions, and measures over all records."""
    import runpy

    import yaml
    from llamafactory_video.lmms.messages import conversation_of, decoding_of
    from llamafactory_video.records.question import read_questions

    write_clip(tmp_path / "0.mp4")
    (tmp_path / "a.png").write_bytes(b"")
    turns = [
        {"from": "human", "value": "<video>看<image>"},
        {"from": "gpt", "value": "塔"},
        {"from": "human", "value": "再看"},
    ]
    records = [
        {
            "video": {"path": "0.mp4", "start": 0.5, "end": 1.5, "fps": 2},
            "image": "a.png",
            "system": "说",
            "conversations": [*turns, {"from": "gpt", "value": {"tags": TAGS[:2], "n": 1.50}}],
        },
        {"conversations": [turns[2], {"from": "gpt", "value": {"tags": TAGS[1:3], "n": 2}}]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    told = run("lmf-video", "eval", str(tmp_path / "data.json"), "--export-lmms", str(tmp_path / "my task"))
    assert told.returncode == 0 and "2 records as the task my_task" in told.stdout, told.stderr
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda loader, node: node.value.removeprefix("utils."))
    task = yaml.load((tmp_path / "my task/my_task.yaml").read_text(encoding="utf-8"), loader)
    functions = runpy.run_path(str(tmp_path / "my task/utils.py"))
    lines = (tmp_path / "my task/test.jsonl").read_text(encoding="utf-8").splitlines()
    docs = [json.loads(line) for line in lines]
    wanted = [each.conversation for each in read_questions(tmp_path / "data.json")]
    for doc, conversation in zip(docs, wanted, strict=True):
        found = conversation_of(functions[task["doc_to_messages"]](doc))
        assert (found.messages, found.system) == (conversation.messages, conversation.system)
        assert found.videos == conversation.videos and found.images == conversation.images
    assert functions[task["doc_to_visual"]](docs[0]) == [str(tmp_path / "0.mp4"), str(tmp_path / "a.png")]
    answers = [text({"tags": TAGS[:2], "n": 1}), "{"]
    results = [functions[task["process_results"]](doc, [answer]) for doc, answer in zip(docs, answers, strict=True)]
    examples = [Example(str(i), (), record["conversations"][-1]["value"]) for i, record in enumerate(records)]
    ours = make_report(examples, {"m": answers}).value["models"]["m"]
    for metric in task["metric_list"]:
        name = metric["metric"]
        value = functions[metric["aggregation"]]([result[name] for result in results])
        assert value == pytest.approx(ours[name.replace("tags_", "tags.").replace("n_", "n.")]["value"], abs=1e-6)
    assert [m["higher_is_better"] for m in task["metric_list"] if m["metric"] == "n_error"] == [False]
    drawn = decoding_of({"max_new_tokens": 8, "temperature": 0.5, "do_sample": True, "until": ["x"]})
    assert (drawn.max_new_tokens, drawn.temperature, drawn.stop) == (8, 0.5, ("x",))
    assert decoding_of({"temperature": 0.7, "do_sample": False}).temperature == 0
