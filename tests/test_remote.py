"""Clips and pictures at addresses: fetched once, within bounds, and shown as the same files are."""

import contextlib
import http.server
import json
import multiprocessing
import time

import fsspec
import numpy as np
import processes
import pytest
from conftest import write_clip
from fsspec.registry import known_implementations
from llamafactory_video.media import Clip, is_address
from llamafactory_video.records.clips import decode_clip
from llamafactory_video.tools.cli import check
from llamafactory_video.video import remote
from llamafactory_video.video.cache import FrameCache
from llamafactory_video.video.probe import ClipError
from llamafactory_video.video.reader import ClipReader
from llamafactory_video.video.sampling import Sampling
from PIL import Image
from processes import run
from runs import make_folder, recipe_keys, train, write_recipe

SAMPLING = Sampling("qwen_finetune", fps=4, min_frames=2, max_frames=8, min_pixels=4096, max_pixels=10**8)


@contextlib.contextmanager
def served(folder, cut=0, pause=0.0):
    """A server of a folder's files, its address, and the paths that were asked for.

    Args:
        cut: bytes of each answer that are kept back, though they were announced.
        pause: seconds before an answer.
    """
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def do_GET(self):
            asked.append(self.path)
            time.sleep(pause)
            if not cut:
                return super().do_GET()
            data = (folder / self.path[1:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) - cut])

        def log_message(self, *args):
            pass

    with processes.served(Handler) as address:
        yield address, asked


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "served/a b.mp4")


def reader(tmp_path, **options):
    return ClipReader(SAMPLING, FrameCache(tmp_path / "cache", 1 << 30), may_fetch=True, **options)


def _read_elsewhere(reader, address, queue):
    queue.put(reader.read(address).frames.sum())


def test_a_clip_is_fetched_once_and_shown_as_its_file_is(clip, tmp_path):
    wanted = ClipReader(SAMPLING).read(str(clip))
    with served(clip.parent) as (server, asked):
        address = f"{server}/a%20b.mp4"
        ours = reader(tmp_path)
        planned = ours.plan(address)
        assert planned.clip == Clip(address) and planned.plan == wanted.plan
        np.testing.assert_array_equal(ours.decode(planned).frames, wanted.frames)
        part = ours.read(Clip(address, start=0.5))
        np.testing.assert_array_equal(part.frames, ClipReader(SAMPLING).read(Clip(str(clip), start=0.5)).frames)
        # Other readers, and processes forked from one that has fetched, ask the server no more; or for what is new.
        queue, fork = multiprocessing.get_context("fork").Queue(), multiprocessing.get_context("fork")
        (clip.parent / "b.mp4").write_bytes(write_clip(tmp_path / "b.mp4", seed=1).read_bytes())
        work = [fork.Process(target=_read_elsewhere, args=(reader(tmp_path), f"{server}/b.mp4", queue)) for _ in "12"]
        for process in work:
            process.start()
        sums = {queue.get(timeout=60) for _ in work}
        for process in work:
            process.join()
        assert sums == {ClipReader(SAMPLING).read(str(tmp_path / "b.mp4")).frames.sum()}
        assert sorted(asked) == ["/a%20b.mp4", "/b.mp4"]
        size = ours.cache.size()
        assert size.fetched == 2 and "2 fetched files" in str(size)
        ours.cache.clear()
        assert ours.cache.size().fetched == 0
        reader(tmp_path).read(address)
        assert len(asked) == 3


def test_other_file_systems_are_fsspecs(clip, tmp_path, monkeypatch):
    """Also one that is not installed, as s3 is without s3fs."""
    absent = {"class": "absent_fs.FileSystem", "err": "Install absent_fs to access it"}
    monkeypatch.setitem(known_implementations, "absent", absent)
    fsspec.filesystem("memory").pipe("/bucket/a.mp4", clip.read_bytes())
    np.testing.assert_array_equal(
        reader(tmp_path).read("memory://bucket/a.mp4").frames, ClipReader(SAMPLING).read(str(clip)).frames
    )
    with pytest.raises(ClipError, match=r"memory://bucket/gone.mp4: cannot be fetched: "):
        reader(tmp_path).read("memory://bucket/gone.mp4")
    with pytest.raises(ClipError, match=r"absent://bucket/a.mp4: cannot be fetched: Install absent_fs"):
        reader(tmp_path).read("absent://bucket/a.mp4")
    with pytest.raises(ClipError, match="cannot be fetched: Protocol not known: nowhere"):
        reader(tmp_path).read("nowhere://bucket/a.mp4")


def test_what_cannot_be_fetched_says_why(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (0, 0))
    with served(clip.parent) as (server, asked):
        address = f"{server}/a%20b.mp4"
        with pytest.raises(ClipError, match=f"{address}: is an address; with `remote_media: true` it is fetched"):
            ClipReader(SAMPLING, FrameCache(tmp_path / "cache", 1 << 30)).plan(address)
        with pytest.raises(ClipError, match="there is no cache to fetch it into; set `video_cache: true`"):
            ClipReader(SAMPLING, may_fetch=True).plan(address)
        assert not asked
        with pytest.raises(ClipError, match=rf"{address}: has more than video_remote_gb, "):
            reader(tmp_path, remote=1000).plan(address)
        with pytest.raises(ClipError, match=r"gone\.mp4: cannot be fetched: "):
            reader(tmp_path).plan(f"{server}/gone.mp4")
        assert asked.count("/gone.mp4") == 1
    with served(clip.parent, cut=100) as (server, asked):
        with pytest.raises(ClipError, match="cannot be fetched: "):
            reader(tmp_path).plan(f"{server}/a%20b.mp4")
        assert len(asked) >= 3  # and as often as aiohttp asks again by itself
    with (
        served(clip.parent, pause=5) as (server, _),
        pytest.raises(ClipError, match="its server hangs: nothing came within video_timeout, 0.2 s"),
    ):
        reader(tmp_path, timeout=0.2).plan(f"{server}/a%20b.mp4")
    assert not list((tmp_path / "cache/remote").glob("*/*.tmp"))


def test_what_is_an_address():
    assert all(map(is_address, ("https://x/a.mp4", "s3://b/a.mp4", "hf://datasets/x/a.mp4")))
    assert not any(map(is_address, ("a.mp4", "/a//b.mp4", "C://a.mp4", "data:video/mp4;base64,", None, b"https://x")))
    assert decode_clip(Clip("https://x/a.mp4", start=1.0).encode()) == Clip("https://x/a.mp4", start=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("remote"))


def test_training_on_addresses_is_training_on_files(folder, tmp_path):
    """Clips, pictures and lists of frames, by several processes that read."""
    media = folder / "media"
    for i in range(4):
        Image.effect_noise((96, 64), 60).convert("RGB").save(media / f"frame{i}.png")

    def records(place):
        turns = [{"from": "human", "value": "<video><image>看"}, {"from": "gpt", "value": "好" * 5}]
        videos = [f"{place}0.mp4", {"path": f"{place}1.mp4", "fps": 2}, [f"{place}frame{i}.png" for i in range(4)]]
        return [{"videos": [video], "image": f"{place}a.png", "conversations": turns} for video in videos]

    with served(media) as (server, asked):
        for name, place in (("files", ""), ("addresses", f"{server}/")):
            (tmp_path / f"{name}.json").write_text(json.dumps(records(place)), encoding="utf-8")
        info = {
            name: {"file_name": f"{name}.json", "formatting": "video_conversation"} for name in ("files", "addresses")
        }
        (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        keys = {
            **recipe_keys(folder),
            **{"dataset_dir": str(tmp_path), "video_cache_dir": str(tmp_path / "cache"), "dataset": "files"},
            **{"max_steps": 4, "per_device_train_batch_size": 3, "dataloader_num_workers": 2},
        }
        refused = run("lmf-video", "check", str(write_recipe({**keys, "dataset": "addresses"}, tmp_path / "x")))
        assert refused.returncode == 1 and "give its path; or set `remote_media: true`" in refused.stdout
        assert not asked
        wanted = train(keys, tmp_path / "run files")
        found = train({**keys, "dataset": "addresses", "remote_media": True}, tmp_path / "run addresses")
        assert [line["loss"] for line in found] == [line["loss"] for line in wanted]
        assert sorted(asked) == sorted(
            {f"/{name}" for name in ("0.mp4", "1.mp4", "a.png")} | {f"/frame{i}.png" for i in range(4)}
        )
        file = write_recipe({**keys, "dataset": "addresses", "remote_media": True}, tmp_path / "y")
        assert check(file, []) == 0 and len(asked) == 7


def test_infer_fetches_where_it_is_told_to(folder, tmp_path):
    with served(folder / "media") as (server, _):
        words = ["infer", "--model", str(folder / "model"), "--prompt", "看", "--max-new-tokens", "2", "--video"]
        asked = run("lmf-video", *words, f"{server}/0.mp4", XDG_CACHE_HOME=str(tmp_path))
        assert asked.returncode == 1 and "with `remote_media: true` it is fetched" in asked.stderr + asked.stdout
        asked = run("lmf-video", *words, f"{server}/0.mp4", "--remote-media", XDG_CACHE_HOME=str(tmp_path))
        assert asked.returncode == 0, asked.stderr
