"""Decoded frames, and what is known of files, on disk: a clip is decoded once, whatever the number of epochs and runs.

    FOLDER/frames/ab/KEY       planned frames, uint8, behind one line of JSON with their shape and checksum
    FOLDER/files/ab/KEY.json   a file's packets as `probe` found them, and a hash of its content

An entry's key is made of the file's content and the whole plan, so another fps or size, or an edited clip, never meets
an old entry. Entries are written under a name of their own and renamed, so a reader sees a whole one or none, whoever
else reads, writes or is killed. A token takes 6144 bytes.
"""

import contextlib
import fcntl
import functools
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
import torchvision
import xxhash

from .probe import Orientation, VideoFile
from .sampling import ClipInfo, FramePlan

logger = logging.getLogger(__name__)

_VERSION = f"1 av {av.__version__} torchvision {torchvision.__version__}"  # what else decides on a frame's values
_SWEEP_SHARE = 256  # each process sweeps after it wrote this part of the limit
_HIGH, _LOW = 0.9, 0.8  # shares of the limit: above the first, the oldest leave until the second is reached
_LEFTOVER_SECONDS = 3600  # a file still being written is never as old
_TOUCH_SECONDS = 60
GIB = 1 << 30


def default_folder() -> Path:
    """Where frames are kept if the recipe does not say: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "llamafactory_video")


def default_limit(folder: Path) -> int:
    """Half of what is free on the folder's disk, what the cache already holds included, in bytes."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return (shutil.disk_usage(existing).free + sum(size for _, size, _ in _entries(folder / "frames"))) // 2


@functools.lru_cache(maxsize=65536)
def _content(path: str, stamp: tuple[int, int]) -> str:
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def frame_key(contents: list[str], file: VideoFile | None, plan: FramePlan) -> str:
    """The key of a plan's frames.

    Args:
        contents: hashes of the file, or of the pictures of the plan in order.
        file: how it is decoded; None for pictures.
    """
    how = None if file is None else (file.orientation, file.counted)
    return xxhash.xxh3_128_hexdigest(repr((_VERSION, contents, how, plan)).encode())


def _entries(folder: Path) -> Iterator[tuple[float, int, str]]:
    """Time of the last use, bytes and path of every file two levels below."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as shards:
        for shard in shards:
            with contextlib.suppress(OSError), os.scandir(shard.path) as files:
                for file in files:
                    with contextlib.suppress(FileNotFoundError):
                        found = file.stat()
                        yield found.st_mtime, found.st_size, file.path


@dataclass
class CacheSize:
    """What a cache holds: clips and bytes of their frames, and files it knows."""

    clips: int
    bytes: int
    files: int


class FrameCache:
    """Frames in a folder that any number of processes may share.

    Args:
        limit: bytes that the frames may take; those used longest ago leave first.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._written = limit  # as if enough had been written: the first write looks at what is there
        self._broken = False

    def _path(self, kind: str, key: str) -> Path:
        return Path(f"{self.folder}/{kind}/{key[:2]}/{key[2:]}")

    def read(self, key: str) -> np.ndarray | None:
        """The frames of an entry, (T, H, W, 3) uint8, or None."""
        path = self._path("frames", key)
        try:
            with open(path, "rb") as file:
                header = json.loads(file.readline())
                frames = np.fromfile(file, np.uint8)
                last_use = os.fstat(file.fileno()).st_mtime
            if xxhash.xxh3_64_hexdigest(frames) != header["checksum"]:
                raise ValueError("checksum")
            frames = frames.reshape(header["shape"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("The frame cache's %s is damaged (%s); the clip is decoded again.", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        if last_use < time.time() - _TOUCH_SECONDS:
            with contextlib.suppress(OSError):
                os.utime(path)
        return frames

    def holds(self, key: str) -> bool:
        """Whether there is an entry; it is not read."""
        return self._path("frames", key).exists()

    def write(self, key: str, frames: np.ndarray, source: str) -> None:
        """Keep an entry. A disk that is full or cannot be written ends the writing of this process, with a warning."""
        header = {
            "checksum": xxhash.xxh3_64_hexdigest(np.ascontiguousarray(frames)),
            "shape": frames.shape,
            "source": source,
        }
        line = json.dumps(header, ensure_ascii=False).encode() + b"\n"
        if len(line) + frames.nbytes > self.limit * _LOW:
            return
        self._write(self._path("frames", key), line, np.ascontiguousarray(frames).data)
        self._written += frames.nbytes
        if self._written > self.limit // _SWEEP_SHARE:
            self._written = 0
            self.sweep()

    def _write(self, path: Path, *parts: bytes | memoryview) -> None:
        if self._broken:
            return
        partial = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            with os.fdopen(handle, "wb") as file:
                for part in parts:
                    file.write(part)
            os.replace(partial, path)
        except OSError as error:
            self._broken = True
            logger.warning(
                "The frame cache %s cannot be written (%s). Training goes on and decodes clips anew in every epoch.",
                self.folder,
                error.strerror,
            )
            if partial is not None:
                with contextlib.suppress(OSError):
                    os.unlink(partial)

    def sweep(self) -> None:
        """Let the oldest entries leave if the limit is near; one process at a time."""
        with contextlib.suppress(OSError), open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            entries = sorted(_entries(self.folder / "frames"))
            total = sum(size for _, size, _ in entries)
            goal = self.limit * _LOW if total > self.limit * _HIGH else total
            for used, size, path in entries:
                leftover = path.endswith(".tmp") and used < time.time() - _LEFTOVER_SECONDS
                if total > goal or leftover:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                    total -= size

    def read_file(self, path: str, stamp: tuple[int, int]) -> VideoFile | None:
        """What is known of a video file, if it has not changed since."""
        try:
            known = json.loads(self._facts(path).read_bytes())
            if known["version"] != _VERSION or tuple(known["file"]["stamp"]) != stamp:
                return None
            facts = known["file"]
            info = ClipInfo(**{**facts["info"], "times": tuple(facts["info"]["times"])})
            orientation = Orientation(**facts["orientation"])
            return VideoFile(**{**facts, "info": info, "orientation": orientation, "stamp": stamp})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_file(self, path: str, file: VideoFile) -> None:
        """Keep what is known of a video file."""
        facts = {"version": _VERSION, "path": os.path.abspath(path), "file": asdict(file)}
        self._write(self._facts(path), json.dumps(facts, ensure_ascii=False).encode())

    def _facts(self, path: str) -> Path:
        key = xxhash.xxh3_128_hexdigest(os.fsencode(os.path.abspath(path)))
        return self._path("files", f"{key}.json")

    def content(self, path: str, stamp: tuple[int, int]) -> str:
        """A hash of a file's content; `stamp` is `probe.file_stamp`'s."""
        return _content(path, stamp)

    def size(self) -> CacheSize:
        """Count what is there."""
        frames = [size for _, size, path in _entries(self.folder / "frames") if not path.endswith(".tmp")]
        return CacheSize(len(frames), sum(frames), sum(1 for _ in _entries(self.folder / "files")))

    def clear(self) -> CacheSize:
        """Remove everything; what it was."""
        size = self.size()
        for kind in ("frames", "files"):
            shutil.rmtree(self.folder / kind, ignore_errors=True)
        return size
