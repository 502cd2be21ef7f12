"""Annotation files: reading, errors by place, the cache, and what LLaMA-Factory makes of the rows."""

import gzip
import json
import os
import subprocess
import sys
import unicodedata

import pytest
from llamafactory_video.host.rows import LAYOUT
from llamafactory_video.records import files
from llamafactory_video.records import table as loader
from llamafactory_video.records.files import MediaFinder, read_records
from llamafactory_video.records.report import DatasetError
from llamafactory_video.records.table import load_conversations


def record(i=0, answer=None):
    turns = [{"from": "human", "value": "<video>\n描述"}, {"from": "gpt", "value": answer or {"标签": [f"凯{i}"]}}]
    return {"video": "a.mp4", "conversations": turns}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.mp4").touch()
    return tmp_path


def load(folder, name="data.json", **kwargs):
    return load_conversations(
        folder / name, str(folder), LAYOUT, cache_dir=str(folder / "cache"), progress=False, **kwargs
    )


def answers(dataset):
    return [row["_response"][0]["content"] for row in dataset]


@pytest.mark.parametrize("chunk", [3, 64, 1 << 22])
@pytest.mark.parametrize("style", ["array", "indented", "lines", "byte order mark"])
def test_files_are_read_in_any_chunks(folder, chunk, style, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    records = [record(i, {"a": 1} if i % 2 else {"b": [1, {"深": "😀"}], "c": "]},"}) for i in range(20)]
    text = json.dumps(records, ensure_ascii=False, indent=2 if style == "indented" else None)
    if style == "lines":
        text = "\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n"
    (folder / "data.json").write_text(text, encoding="utf-8-sig" if style == "byte order mark" else "utf-8")
    read = list(read_records(folder / "data.json"))
    assert [r.error for r in read] == [None] * 20
    assert json.loads(json.dumps([r.value for r in read])) == records
    if style == "indented":
        lines = text.splitlines()
        assert all(lines[r.line - 1] == "  {" for r in read)
    # Records with different keys keep their own.
    assert answers(load(folder))[:2] == ['{"b": [1, {"深": "😀"}], "c": "]},"}', '{"a": 1}']


def test_a_folder_of_files(folder):
    parts = folder / "parts"
    parts.mkdir()
    (parts / "2.jsonl").write_text(json.dumps(record(2)), encoding="utf-8")
    (parts / "1.json").write_text(json.dumps([record(0), record(1)]), encoding="utf-8")
    assert answers(load(folder, "parts")) == [f'{{"标签": ["凯{i}"]}}' for i in range(3)]


def test_what_is_read_otherwise_than_it_stands_is_told_once(folder):
    turns = [{"from": "human", "value": "<video>看"}, {"from": "gpt", "value": "好"}]
    clips = ["a.mp4", {"path": "a.mp4", "sample_fps": 4}, {"path": "a.mp4", "sample_fps": 2}]
    records = [{"video": clip, "conversations": turns} for clip in clips]
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    said = []
    assert [json.loads(row["_videos"][0])["fps"] for row in load(folder, log=said.append).select([1, 2])] == [4, 2]
    assert len(said) == 1
    assert "sample_fps of a video file" in said[0]
    assert "(2 times, first in" in said[0]
    assert "record 2" in said[0]


BROKEN = {
    "not JSON on a line": ('{"a": 1}\n{"a": }\n', "record 2 (line 2): record: not JSON: Expecting value"),
    "cut off": ('[{"a": 1},\n {"a": ', "record 2 (line 2): record: not JSON: Expecting value"),
    "no bracket": ('[{"a": 1}', "record 2 (line 1): record: expected , or ] and found the end of the file"),
    "rest": ("[]\n[]", "record 1 (line 2): record: '[' after the end of the array"),
    "comma": ('[{"a": 1},]', "record 2 (line 1): record: a comma before the closing bracket"),
    "key twice": ('[{"a": 1, "a": 2}]', 'the key "a" stands twice in one object'),
    "nan": ('{"a": NaN}', "a is NaN, which is no JSON; write null"),
    "surrogate": ('[{"a": "\\ud800"}]', "holds half a surrogate pair"),
    "nothing": ("", "no records in it"),
    "deep": ("[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_their_place(folder, name):
    text, expected = BROKEN[name]
    (folder / "data.json").write_text(text)
    with pytest.raises(DatasetError, match="data.json") as error:
        load(folder)
    assert expected in str(error.value)


def test_another_encoding_is_named(folder):
    (folder / "data.json").write_bytes(json.dumps([record()], ensure_ascii=False).encode("gbk"))
    with pytest.raises(DatasetError, match="not UTF-8"):
        load(folder, most_wrong=0.5)
    lines = [json.dumps(record(i), ensure_ascii=False).encode("gbk" if i == 5 else "utf-8") for i in range(10)]
    (folder / "lines.jsonl").write_bytes(b"\n".join(lines))
    said = []
    assert len(load(folder, "lines.jsonl", most_wrong=0.5, log=said.append)) == 9
    assert "record 6 (line 6): record: not UTF-8" in said[0]


@pytest.mark.parametrize(
    "wrong", ['{"a": NaN}', '{"a": 1, "a": 2}', '{"conversations": [1e400, {"from": "gpt"}]}', "[" * 600 + "]" * 600]
)
def test_one_wrong_record_hides_no_other(folder, wrong):
    texts = [json.dumps(record(i), ensure_ascii=False) for i in range(30)]
    texts[3] = wrong
    texts[20] = json.dumps({**record(), "video": "gone.mp4"})
    for name, text in (("data.json", "[" + ",\n".join(texts) + "]"), ("data.jsonl", "\n".join(texts))):
        (folder / name).write_text(text, encoding="utf-8")
        said = []
        assert len(load(folder, name, most_wrong=0.5, log=said.append)) == 28
        assert "record 4 (line 4)" in said[0] and "record 21 (line 21)" in said[0]


def test_a_file_that_cannot_be_read_to_its_end_is_never_skipped(folder):
    texts = [json.dumps(record(i), ensure_ascii=False) for i in range(5)]
    (folder / "data.json").write_text("[" + ",\n".join(texts) + ', {"a": ', encoding="utf-8")
    with pytest.raises(DatasetError, match="could not be read to its end"):
        load(folder, most_wrong=0.5)


def test_a_json_file_of_another_shape_is_one_error(folder):
    (folder / "data.json").write_text(json.dumps({"data": [record()]}, indent=1), encoding="utf-8")
    with pytest.raises(DatasetError, match="1 of 1 records are wrong") as error:
        load(folder)
    assert "holds an array of records, or one record on each line" in str(error.value)


def test_objects_that_span_lines_and_packed_files_are_read(folder):
    rows = [record(i) for i in range(3)]
    (folder / "flat.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    expected = [{**row, "_source": None} for row in load(folder, "flat.jsonl").to_list()]
    text = "\n".join(json.dumps(row, ensure_ascii=False, indent=2) for row in rows)
    (folder / "spread.jsonl").write_text(text, encoding="utf-8")
    (folder / "one.json").write_text(json.dumps(rows[0], ensure_ascii=False, indent=2), encoding="utf-8")
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress((folder / "flat.jsonl").read_bytes()))
    (folder / "array.json.gz").write_bytes(gzip.compress(json.dumps(rows, indent=1).encode()))
    for name, count in (("spread.jsonl", 3), ("one.json", 1), ("packed.jsonl.gz", 3), ("array.json.gz", 3)):
        found = [{**row, "_source": None} for row in load(folder, name).to_list()]
        assert found == expected[:count], name
    lines = text.splitlines()
    (folder / "broken.jsonl").write_text("\n".join(lines[:-4]), encoding="utf-8")
    with pytest.raises(DatasetError, match=r"record 3 \(line \d+\): .*not JSON: .*nothing after it was read"):
        load(folder, "broken.jsonl")


def test_other_files_are_called_what_they_are(folder):
    for name, content, message in (
        ("a.parquet", b"PAR1....", "a parquet file; write its records with"),
        ("a.csv", b"video,text\na.mp4,x\n", "a table; records are read from"),
        ("a.xlsx", b"PK\x03\x04", "a zip archive or a spreadsheet"),
        ("cut.jsonl.gz", gzip.compress(b'{"conversations": []}' * 99)[:-9], "end-of-stream|Compressed file ended"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(DatasetError, match=message):
            load(folder, name)


def test_files_are_found_as_their_names_are_written_elsewhere(folder, monkeypatch):
    media = folder / "media"
    names = ["片段/第一 集.mp4", unicodedata.normalize("NFD", "résumé.mp4")]
    for name in names:
        (media / name).parent.mkdir(parents=True, exist_ok=True)
        (media / name).touch()
    monkeypatch.setenv("HOME", str(media))
    find = MediaFinder(str(media))
    for written in ("片段\\第一 集.mp4", " 片段/第一 集.mp4", ".\\片段\\第一 集.mp4", "~/片段/第一 集.mp4"):
        assert os.path.samefile(find(written), media / names[0]), written
    assert find(unicodedata.normalize("NFC", "résumé.mp4")) == str(media / names[1])
    assert find("gone.mp4") is None
    for written, message in (
        ("片段", "is a folder; list its pictures in `frames`"),
        ("其他/a.mp4", f"there is no folder {media}/其他"),
        ("片段/第一集.mp4", f"is 第一 集.mp4 in {media}/片段 meant?"),
        ("zzz.mp4", f"looked in {media}"),
    ):
        assert message in find.explain(written)


def test_wrong_records_stop_or_are_left_out_with_a_report(folder, monkeypatch):
    records = [record(i) for i in range(10)]
    records[3]["video"] = "gone.mp4"
    records[7]["conversations"][1]["value"] = ""
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(DatasetError) as error:
        load(folder, report_dir=folder / "out")
    text = str(error.value)
    assert "2 of 10 records are wrong" in text and "skip_wrong_records: true" in text
    assert 'record 4 (line 1): video: no file "gone.mp4"' in text
    assert "record 8 (line 1): conversations[1].value: empty" in text
    assert len((folder / "out" / "wrong_records_data.txt").read_text().splitlines()) == 2

    for again in (False, True):  # said every time, not only when the cache is cold
        said = []
        if again:
            monkeypatch.setattr(loader, "read_records", lambda file: pytest.fail("read again"))
        dataset = load(folder, most_wrong=0.5, log=said.append)
        assert len(dataset) == 8 and "凯3" not in str(answers(dataset))
        assert "2 of 10 records are wrong and left out, 8 remain" in said[0] and "record 4" in said[0]


def test_the_cache_is_used_and_never_stale(folder, monkeypatch):
    file = folder / "data.json"
    file.write_text(json.dumps([record(0)]), encoding="utf-8")
    load(folder)
    with monkeypatch.context() as patch:
        patch.setattr(loader, "read_records", lambda file: pytest.fail("read again"))
        assert len(load(folder)) == 1
    assert answers(load(folder, indent=1)) == ['{\n "标签": [\n  "凯0"\n ]\n}']
    file.write_text(json.dumps([record(1)]), encoding="utf-8")
    os.utime(file, ns=(1, 1))
    assert answers(load(folder)) == ['{"标签": ["凯1"]}']
    (folder / "a.mp4").unlink()
    with pytest.raises(DatasetError, match='no file "a.mp4"'):
        load(folder)
    assert not list((folder / "cache").rglob("*.tmp"))


def test_partial_files_of_killed_runs_are_removed(folder):
    (folder / "data.json").write_text(json.dumps([record(0)]), encoding="utf-8")
    cache = folder / "cache" / "llamafactory_video"
    cache.mkdir(parents=True)
    for name in ("old.tmp", "of another run.tmp"):
        (cache / name).touch()
    os.utime(cache / "old.tmp", (1, 1))
    load(folder)
    assert [file.name for file in cache.glob("*.tmp")] == ["of another run.tmp"]


def test_llamafactorys_own_video_demo_format(folder):
    """`videos` and `messages` with role and content, as in its mllm_video_demo.json."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<video>Why is this video funny?"},
                {"role": "assistant", "content": "Because a baby is reading."},
            ],
            "videos": ["a.mp4"],
        }
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    (row,) = load(folder)
    assert row["_videos"] == [str(folder / "a.mp4")]
    assert row["_prompt"] == [{"content": "<video>Why is this video funny?", "role": "user"}]


@pytest.mark.thorough
def test_200_000_records_load_in_a_minute_and_2_gb(folder):
    """In a process of its own, so that the memory measured is the loader's."""
    answer = {"video_description": "凯在中路推塔，" * 20, "score": 0.25, "tags": ["游戏直播", "王者荣耀"]}
    text = json.dumps(record(0, answer), ensure_ascii=False)
    (folder / "data.json").write_text("[" + ",\n".join([text] * 200_000) + "]", encoding="utf-8")
    code = f"""
import time
from pathlib import Path
from llamafactory_video.host.rows import LAYOUT
from llamafactory_video.records.table import load_conversations
start = time.perf_counter()
dataset = load_conversations(Path({str(folder / "data.json")!r}), {str(folder)!r}, LAYOUT, cache_dir={str(folder / "cache")!r})
# Not ru_maxrss, which begins with that of the process that started this one.
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
print(len(dataset), time.perf_counter() - start, peak / 2**20)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, seconds, gib = map(float, result.stdout.split())
    print(f"{count:.0f} records in {seconds:.1f} s, {gib:.2f} GiB")
    assert count == 200_000 and seconds < 60 and gib < 2
