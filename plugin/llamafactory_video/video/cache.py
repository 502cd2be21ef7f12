"""Decoded frames, and what is known of files, on disk: a clip is decoded once, whatever the number of epochs and runs.

    FOLDER/frames/ab/KEY       planned frames, uint8, behind one line of JSON with their shape and checksum
    FOLDER/files/ab/KEY.json   a file's packets as `probe` found them, and a hash of its content
    FOLDER/remote/ab/KEY       what lies at an address (remote.py)

An entry's key is made of the file's content and the whole plan, so another fps or size, or an edited clip, never meets
an old entry. Entries are written under a name of their own and renamed, so a reader sees a whole one or none, whoever
else reads, writes or is killed. A visual token takes 6144 bytes. No file is touched whose name is not an entry's.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
import PIL
import torch
import torchvision
import xxhash
from filelock import FileLock, Timeout

from ..digest import code_digest
from . import codecs, damage, decode, orientation, probe, sampling
from .orientation import Orientation
from .probe import VideoFile
from .remote import fetch
from .sampling import ClipInfo, FramePlan

logger = logging.getLogger(__name__)
# What else decides on a frame's values; the first number is that of our own decoding.
_LIBRARIES = f"av {av.__version__} torch {torch.__version__} {torchvision.__version__} pillow {PIL.__version__}"
_DECODING = (decode.__name__, damage.__name__, orientation.__name__)
_PROBING = (probe.__name__, codecs.__name__, sampling.__name__)
_SWEEP_SHARE = 256  # each process sweeps after it wrote this part of the limit
_KINDS = ("frames", "files", "remote")
_HIGH, _LOW = 0.9, 0.8  # shares of the limit: above the first, the oldest leave until the second is reached
_LEFTOVER_SECONDS = 3600  # a file still being written is never as old
_TOUCH_SECONDS = 60
_FINAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
_SHARD, _ENTRY = re.compile("[0-9a-f]{2}"), re.compile(r"[0-9a-f]{30}(\.json)?(\.[0-9]+-[0-9]+\.tmp)?")
GIB = 1 << 30
_LEAST_CACHE = 1 * GIB  # below it, a cache that nobody asked for is not worth its place
_RESERVE, _RESERVE_SHARE = 2 * GIB, 0.05  # the smaller of the two is left free on the disk for others


def default_folder() -> Path:
    """Where frames are kept if the recipe does not say: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "llamafactory_video")


def free_space(folder: Path) -> tuple[int, int]:
    """Bytes that are free and bytes in all of the disk of a folder that need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    usage = shutil.disk_usage(existing)
    return usage.free, usage.total


@functools.lru_cache(maxsize=8192)
def content_hash(path: str, stamp: tuple[int, int]) -> str:
    """A hash of a file's content; `stamp` is `probe.file_stamp`'s."""
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
    how = None if file is None else (file.orientation, file.positions)
    return xxhash.xxh3_128_hexdigest(repr((_LIBRARIES, code_digest(*_DECODING), contents, how, plan)).encode())


def _facts_version() -> str:
    return f"{_LIBRARIES} {code_digest(*_DECODING, *_PROBING)}"


def _entries(folder: Path) -> Iterator[tuple[float, int, str]]:
    """Time of the last use, bytes and path of every entry."""
    with contextlib.suppress(OSError), os.scandir(folder) as shards:
        for shard in shards:
            if not _SHARD.fullmatch(shard.name):
                continue
            with contextlib.suppress(OSError), os.scandir(shard.path) as files:
                for file in files:
                    with contextlib.suppress(OSError):
                        if _ENTRY.fullmatch(file.name):
                            found = file.stat()
                            yield max(found.st_atime, found.st_mtime), found.st_size, file.path


@dataclass
class CacheSize:
    """What a cache holds: clips, files it knows, files it fetched; and bytes of frames and of fetched files."""

    clips: int
    bytes: int
    files: int
    fetched: int

    def __str__(self) -> str:
        fetched = f" and {self.fetched} fetched files" if self.fetched else ""
        return f"{self.clips} clips{fetched} in {self.bytes / GIB:.2f} GiB"


class FrameCache:
    """Frames in a folder that any number of processes may share.

    Args:
        limit: bytes that it may take; what was used longest ago leaves first. None: half of what is free on the disk,
            what the cache already holds included.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder, self.given_limit = folder, limit
        self._written: float | None = None  # since the last sweep
        self._broken = False

    def __reduce__(self) -> tuple:
        # Without what changes from run to run: datasets' own caches are keyed by what a function carries.
        return FrameCache, (self.folder, self.given_limit)

    @functools.cached_property
    def limit(self) -> int:
        """Bytes that it may take."""
        if self.given_limit is not None:
            return self.given_limit
        return (free_space(self.folder)[0] + self.size().bytes) // 2

    def _path(self, kind: str, key: str) -> Path:
        return Path(f"{self.folder}/{kind}/{key[:2]}/{key[2:]}")

    def read(self, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The frames of an entry, `shape` uint8, or None if it is not there."""
        path = self._path("frames", key)
        try:
            with open(path, "rb") as file:
                header = json.loads(file.readline())
                frames = np.fromfile(file, np.uint8)
                last_use = os.fstat(file.fileno()).st_mtime
            if tuple(header["shape"]) != shape or xxhash.xxh3_64_hexdigest(frames) != header["checksum"]:
                raise ValueError("checksum")
            frames = frames.reshape(shape)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            logger.warning("The frame cache's %s cannot be read (%s); the clip is decoded again.", path, error)
            return None
        except (ValueError, KeyError, TypeError) as error:
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
        frames = np.ascontiguousarray(frames)
        header = {"checksum": xxhash.xxh3_64_hexdigest(frames), "shape": frames.shape, "source": source}
        line = json.dumps(header, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        self._write(self._path("frames", key), line, frames.data)

    def _write(self, path: Path, *parts: bytes | memoryview) -> None:
        size = sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts)
        if self._broken:
            return
        if size > self.limit * _LOW:
            return self._give_up(f"one clip takes {size} bytes, nearly all of its limit, {self.limit}")
        free, total = free_space(self.folder)
        reserve = min(_RESERVE, total * _RESERVE_SHARE)
        if free - size < reserve:
            return self._give_up(f"less than {reserve / GIB:.2g} GiB of its disk are free")
        for attempt in (1, 2):  # a folder may be cleared by another process between two steps
            partial = f"{path}.{os.getpid()}-{time.time_ns()}.tmp"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                    for part in parts:
                        file.write(part)
                os.replace(partial, path)
                break
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.unlink(partial)
                if error.errno in _FINAL:
                    return self._give_up(error.strerror)
                if attempt == 2:
                    logger.warning("%s could not be written to the frame cache (%s).", path, error.strerror)
                    return
        self._has_grown(size)

    def _has_grown(self, size: int) -> None:
        if self._written is None:  # processes that live short sweep as often, for what they wrote, as others
            self._written = random.uniform(0, self.limit / _SWEEP_SHARE)
        self._written += size
        if self._written > self.limit / _SWEEP_SHARE:
            self._written = 0
            self.sweep()

    def _give_up(self, reason: str) -> None:
        self._broken = True
        logger.warning(
            "The frame cache %s is read-only from here (%s). Training continues; clips that it does not hold are decoded "
            "on every use.",
            self.folder,
            reason,
        )

    def sweep(self) -> None:
        """Let the oldest entries leave if the limit is near; one process at a time."""
        with contextlib.suppress(OSError, Timeout), FileLock(self.folder / "lock", timeout=0):
            entries = sorted(entry for kind in _KINDS for entry in _entries(self.folder / kind))
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
            if known["version"] != _facts_version() or tuple(known["file"]["stamp"]) != stamp:
                return None
            facts = known["file"]
            info = ClipInfo(**{**facts["info"], "times": tuple(facts["info"]["times"])})
            orientation = Orientation(**facts["orientation"])
            known = {"info": info, "orientation": orientation, "stamp": stamp, "positions": tuple(facts["positions"])}
            return VideoFile(**{**facts, **known})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_file(self, path: str, file: VideoFile) -> None:
        """Keep what is known of a video file."""
        facts = {"version": _facts_version(), "path": os.path.abspath(path), "file": asdict(file)}
        self._write(self._facts(path), json.dumps(facts, ensure_ascii=False).encode("utf-8", "replace"))

    def _facts(self, path: str) -> Path:
        key = xxhash.xxh3_128_hexdigest(os.fsencode(os.path.abspath(path)))
        return self._path("files", f"{key}.json")

    def fetch(self, address: str, most: int, timeout: float | None) -> str:
        """The file that holds what lies at an address, which is fetched once; see `remote.fetch`."""
        place = self._path("remote", xxhash.xxh3_128_hexdigest(address.encode()))
        if not place.is_file():
            fetch(address, place, most, timeout)
            self._has_grown(place.stat().st_size)
        found = place.stat()
        if found.st_atime < time.time() - _TOUCH_SECONDS:
            os.utime(place, ns=(time.time_ns(), found.st_mtime_ns))  # the time of change stays, by which it is known
        return str(place)

    def size(self) -> CacheSize:
        """Count what is there."""
        frames, files, fetched = (
            [size for _, size, path in _entries(self.folder / kind) if not path.endswith(".tmp")] for kind in _KINDS
        )
        return CacheSize(len(frames), sum(frames) + sum(fetched), len(files), len(fetched))

    def clear(self) -> CacheSize:
        """Remove all entries; what they were."""
        size = self.size()
        for kind in _KINDS:
            for _, _, path in list(_entries(self.folder / kind)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        return size


def open_cache(folder: str | None, gib: float | None, log: Callable[[str], None]) -> FrameCache | None:
    """The cache of frames in a folder, or None where there is no room for it; says which, with its size.

    Args:
        folder: None: the usual one.
        gib: the most that it may take; None: half of the disk's free space.
        log: takes a line for the person who runs this.
    """
    without = "Frame cache is off: {}. Every clip is decoded in every epoch. Set `video_cache_dir` to another disk to avoid this."
    try:
        place = Path(folder).expanduser() if folder else default_folder()
        cache = FrameCache(place, None if gib is None else int(gib * GIB))
        if cache.limit < _LEAST_CACHE and gib is None:
            log(without.format(f"the disk of {place} has only {cache.limit / GIB:.1f} GiB to spare"))
            return None
        size = cache.size()
    except (OSError, RuntimeError) as error:  # a folder that may not be looked into, a user without a home
        log(without.format(f"its folder cannot be used ({error})"))
        return None
    log(
        f"Frame cache: {place}, {size}, may grow to {cache.limit / GIB:.1f} "
        "GiB (about 6 KiB a visual token). `video_cache: false` turns it off."
    )
    return cache
