"""The frame cache: what comes out is what went in, whoever reads, writes or dies at the same time."""

import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import signal
import time

import numpy as np
import pytest
from conftest import THOROUGH, write_clip
from llamafactory_video.media import Clip
from llamafactory_video.video import cache as cache_module
from llamafactory_video.video import reader as clip_module
from llamafactory_video.video.cache import FrameCache
from llamafactory_video.video.reader import ClipReader
from llamafactory_video.video.sampling import Sampling
from PIL import Image

SAMPLING = Sampling("qwen_finetune", fps=4, min_frames=2, max_frames=8, min_pixels=4096, max_pixels=10**6)
MIB = 1 << 20


@pytest.fixture
def decoded(monkeypatch):
    """How often a clip was decoded."""
    calls = []
    decode = clip_module.decode_frames
    monkeypatch.setattr(clip_module, "decode_frames", lambda *args: calls.append(args[0]) or decode(*args))
    return calls


def reader(folder, limit=100 * MIB, **settings):
    return ClipReader(SAMPLING.override(**settings), FrameCache(folder, limit))


def test_a_clip_is_decoded_once(clip, tmp_path, decoded):
    plain = ClipReader(SAMPLING).read(str(clip))
    plain_clip = ClipReader(SAMPLING).plan(str(clip))
    decoded.clear()
    for _ in range(2):  # a reader of its own: another process, another run
        shown = reader(tmp_path / "cache").read(str(clip))
        assert shown.plan == plain.plan
        assert np.array_equal(shown.frames, plain.frames)
    assert len(decoded) == 1
    assert reader(tmp_path / "cache").store(plain_clip) is False


def test_another_plan_or_content_never_meets_an_old_entry(clip, tmp_path, decoded):
    path, folder = tmp_path / "clip.mp4", tmp_path / "cache"
    path.write_bytes(clip.read_bytes())
    settings = [{}, {"fps": 2.0}, {"max_pixels": 16384, "min_pixels": 8192}, {"max_frames": 6}]
    for given in settings:
        shown = reader(folder, **given).read(str(path))
        assert np.array_equal(shown.frames, ClipReader(SAMPLING.override(**given)).read(str(path)).frames)
    assert reader(folder).cache.size().clips == len(settings)
    for override in (Clip(str(path), start=1.0), Clip(str(path), end=1.0)):
        assert np.array_equal(reader(folder).read(override).frames, ClipReader(SAMPLING).read(override).frames)

    first = os.stat(path)
    write_clip(path, seed=5)
    os.utime(path, ns=(first.st_atime_ns, first.st_mtime_ns + 1))
    edited = reader(folder).read(str(path)).frames
    assert np.array_equal(edited, ClipReader(SAMPLING).read(str(path)).frames)
    # The same content under another name is the same entry.
    (tmp_path / "copy.mp4").write_bytes(clip.read_bytes())
    decoded.clear()
    reader(folder).read(str(tmp_path / "copy.mp4"))
    assert not decoded


def test_pictures_are_kept_too(clip, tmp_path):
    paths = []
    for i, frame in enumerate(ClipReader(SAMPLING).read(str(clip)).frames[:4]):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(frame).save(paths[-1])
    video = Clip(frames=tuple(paths), frame_rate=4.0)
    first = reader(tmp_path / "cache").read(video)
    assert reader(tmp_path / "cache").store(ClipReader(SAMPLING).plan(video)) is False
    Image.new("RGB", (96, 64), "red").save(paths[1])
    second = reader(tmp_path / "cache").read(video)
    assert not np.array_equal(first.frames, second.frames)


@pytest.mark.parametrize("damage", ["flipped byte", "cut", "empty", "no header"])
def test_damaged_entries_are_noticed(clip, tmp_path, decoded, caplog, damage):
    folder = tmp_path / "cache"
    good = reader(folder).read(str(clip)).frames
    (entry,) = (path for path in folder.glob("frames/*/*"))
    data = bytearray(entry.read_bytes())
    if damage == "flipped byte":
        data[-100] ^= 1
    entry.write_bytes({"cut": data[:-1], "empty": b"", "no header": b"\n" + data[1:]}.get(damage, data))
    decoded.clear()
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(reader(folder).read(str(clip)).frames, good)
    assert len(decoded) == 1
    assert f"{entry} is damaged" in caplog.text
    assert np.array_equal(reader(folder).read(str(clip)).frames, good)
    assert len(decoded) == 1


def test_the_oldest_used_leave_first(tmp_path):
    cache = FrameCache(tmp_path, 10 * MIB)
    frames = np.zeros((1, 512, 2048, 1), np.uint8)  # 1 MiB
    keys = [f"{i:032x}" for i in range(12)]
    for age, key in enumerate(keys[:8]):
        cache.write(key, frames, "clip")
        os.utime(cache._path("frames", key), (age + 1, age + 1))
    assert cache.read(keys[0], frames.shape) is not None  # used now: no longer the oldest
    for key in keys[8:]:
        cache.write(key, frames, "clip")
    left = [i for i, key in enumerate(keys) if cache.holds(key)]
    assert cache.size().bytes <= cache.limit
    assert left[0] == 0
    assert left[1:] == list(range(left[1], 12))
    assert 1 < left[1] < 8


def test_leftovers_of_killed_writers_go(tmp_path):
    cache = FrameCache(tmp_path, 10 * MIB)
    cache.write("ab" * 16, np.zeros((1, 8, 8, 3), np.uint8), "clip")
    leftover = tmp_path / "frames" / "ab" / f"{'cd' * 15}.1-2.tmp"
    leftover.write_bytes(b"half")
    young = tmp_path / "frames" / "ab" / f"{'cd' * 15}.1-3.tmp"
    young.write_bytes(b"half")
    os.utime(leftover, (1, 1))
    cache.sweep()
    assert not leftover.exists()
    assert young.exists()
    assert cache.size().clips == 1


def _use(folder, seed, limit):
    choose = random.Random(seed)
    cache = FrameCache(folder, limit)
    for _ in range(150):
        number = choose.randrange(40)
        key, expected = f"{number:032x}", np.full((2, 64, 64, 3), number, np.uint8)
        frames = cache.read(key, expected.shape)
        if frames is None:
            cache.write(key, expected, "clip")
        elif not np.array_equal(frames, expected):
            os._exit(3)
        if choose.random() < 0.05:
            cache.sweep()


def test_many_processes_and_runs_at_once(tmp_path, caplog):
    """Small limits, so that entries leave while others read and write them; two runs with limits of their own."""
    context = multiprocessing.get_context("fork")
    limit = 30 * 2 * 64 * 64 * 3
    processes = [context.Process(target=_use, args=(tmp_path, i, limit // (1 + i % 2))) for i in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    cache = FrameCache(tmp_path, limit)
    cache.sweep()
    assert 0 < cache.size().bytes <= limit
    assert not list(tmp_path.glob("frames/*/*.tmp"))
    for entry in tmp_path.glob("frames/*/*"):
        assert cache.read(entry.parent.name + entry.name, (2, 64, 64, 3)) is not None
    assert not caplog.text


def _write_on_and_on(folder, ready):
    cache = FrameCache(folder, 1 << 30)
    ready.set()
    for number in range(100000):
        cache.write(f"{number % 50:032x}", np.full((16, 128, 128, 3), number % 50, np.uint8), "clip")


def test_killed_while_writing(tmp_path, caplog):
    context, moments = multiprocessing.get_context("fork"), random.Random(0)
    for _ in range(20 if THOROUGH else 4):
        ready = context.Event()
        process = context.Process(target=_write_on_and_on, args=(tmp_path, ready))
        process.start()
        assert ready.wait(30)
        time.sleep(moments.uniform(0.01, 0.3))
        process.kill()
        process.join()
    cache = FrameCache(tmp_path, 1 << 30)
    found = [number for number in range(50) if cache.holds(f"{number:032x}")]
    assert found
    for number in found:
        assert (cache.read(f"{number:032x}", (16, 128, 128, 3)) == number).all()
    assert not caplog.text


@pytest.mark.parametrize(("disk", "left"), [(1 << 44, 2 << 30), (10 << 30, 1 << 29)])  # 2 GiB, of a small disk 5 %
def test_room_is_left_for_others(clip, tmp_path, monkeypatch, caplog, disk, left):
    for room, kept in ((left, False), (left + MIB, True)):
        monkeypatch.setattr(cache_module, "free_space", lambda _, room=room: (room, disk))
        used = reader(tmp_path / str(kept))
        used.read(str(clip))
        assert used.cache.size().clips == kept
    assert f"is read-only from here (less than {left / (1 << 30):g} GiB of its disk" in caplog.text


def _write_on_a_full_disk(folder, queue):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("llamafactory_video").addHandler(handler)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # the kernel refuses to write on, as on a full disk
    cache = FrameCache(folder, 1 << 30)
    for i in range(3):
        cache.write(f"{i:032x}", np.zeros((4, 64, 64, 3), np.uint8), "clip")
    queue.put((records, cache.size().clips))


def test_a_disk_that_takes_no_more(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_write_on_a_full_disk, args=(tmp_path, queue))
    process.start()
    messages, clips = queue.get()
    process.join()
    assert clips == 0
    assert not list(tmp_path.glob("frames/*/*"))
    assert len(messages) == 1  # said once
    assert f"{tmp_path} is read-only from here" in messages[0]


def test_a_folder_that_cannot_be_written(clip, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    shown = reader(tmp_path / "file" / "cache").read(str(clip))
    assert np.array_equal(shown.frames, ClipReader(SAMPLING).read(str(clip)).frames)
    assert "is read-only from here (Not a directory)" in caplog.text


def test_facts_of_files_are_kept(clip, tmp_path, monkeypatch):
    path = tmp_path / "片段.mp4"
    path.write_bytes(clip.read_bytes())
    first = reader(tmp_path / "cache").plan(str(path)).plan
    (facts,) = tmp_path.glob("cache/files/*/*.json")
    assert json.loads(facts.read_text(encoding="utf-8"))["path"] == str(path)
    assert "片段" in facts.read_text(encoding="utf-8")
    monkeypatch.setattr(clip_module, "probe", lambda *args: pytest.fail("probed again"))
    assert reader(tmp_path / "cache").plan(str(path)).plan == first
    facts.write_text("{half")
    monkeypatch.undo()
    assert reader(tmp_path / "cache").plan(str(path)).plan == first


def test_info_and_clear(clip, tmp_path):
    cache = reader(tmp_path / "cache")
    cache.read(str(clip))
    assert (cache.cache.size().clips, cache.cache.size().files) == (1, 1)
    assert cache.cache.clear().clips == 1
    assert (cache.cache.size().clips, cache.cache.size().files) == (0, 0)
    assert FrameCache(tmp_path / "not" / "there").limit > 0


def test_files_of_others_are_not_touched(tmp_path):
    """`video_cache_dir: data` beside pictures in data/frames/clip1/."""
    others = [tmp_path / "frames" / folder / name for folder in ("clip1", "ab") for name in ("0001.jpg", "a" * 31)]
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(bytes(MIB))
        os.utime(other, (1, 1))
    cache = FrameCache(tmp_path, 2 * MIB)
    for i in range(8):
        cache.write(f"{i:032x}", np.zeros((1, 512, 1024, 1), np.uint8), "clip")
    assert 0 < cache.size().bytes <= cache.limit
    cache.clear()
    assert cache.size().clips == 0
    assert all(other.exists() for other in others)


def test_an_entry_that_may_not_be_read_stays(tmp_path, caplog, monkeypatch):
    """Too many open files, or another user's entry, say nothing about what is in it."""
    cache, frames = FrameCache(tmp_path, MIB), np.ones((1, 8, 8, 3), np.uint8)
    cache.write("ab" * 16, frames, "clip")
    with monkeypatch.context() as patch:
        patch.setattr(np, "fromfile", lambda *args: (_ for _ in ()).throw(OSError(24, "Too many open files")))
        assert cache.read("ab" * 16, frames.shape) is None
    assert np.array_equal(cache.read("ab" * 16, frames.shape), frames)
    assert cache.read("ab" * 16, (1, 8, 8, 4)) is None  # another shape than is wanted is damage


def test_a_folder_cleared_by_another_is_made_again(tmp_path, monkeypatch):
    cache, frames = FrameCache(tmp_path, MIB), np.ones((1, 8, 8, 3), np.uint8)
    cleared = []
    replace = os.replace

    def clear_once(*paths):
        if not cleared:
            cleared.append(FrameCache(tmp_path, MIB).clear())
        replace(*paths)

    monkeypatch.setattr(os, "replace", clear_once)
    cache.write("ab" * 16, frames, "clip")
    assert cache.holds("ab" * 16)


def test_a_file_is_hashed_once(clip, tmp_path, monkeypatch):
    """A reader in another process, or of the next epoch, does not read the whole video for its hash."""
    reader(tmp_path / "cache").read(str(clip))
    monkeypatch.setattr(clip_module, "content_hash", lambda *args: pytest.fail("hashed again"))
    reader(tmp_path / "cache").read(str(clip))


def test_what_a_reader_carries_is_the_same_in_every_run(clip, tmp_path):
    """datasets keys its own caches by it."""
    used = ClipReader(SAMPLING, FrameCache(tmp_path / "cache"))
    used.read(str(clip))
    assert pickle.dumps(used) == pickle.dumps(ClipReader(SAMPLING, FrameCache(tmp_path / "cache")))
