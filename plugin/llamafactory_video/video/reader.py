"""A clip -> its plan, and its planned frames. Training, chat and evaluation have no other way to either."""

import contextlib
import functools
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from ..media import Clip, is_address
from .cache import GIB, FrameCache, content_hash, frame_key
from .damage import count_by_decoding
from .decode import DisagreementError, decode_frames, resize_frame
from .pictures import open_picture, picture_size
from .plan import plan_frames
from .probe import ClipError, Packets, VideoFile, file_stamp, probe
from .sampling import ClipInfo, FramePlan, Sampling, SamplingError, mean_rate
from .threads import deadline, fair_threads, start

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_KNOWN_FILES = 8192  # files whose facts are kept in memory
_KNOWN_PACKETS = 8  # files whose packets are kept too: parts of a recording are read one after the other
ATTEMPTS = 4  # a clip that is replaced this often while it is read is given up


@dataclass(frozen=True)
class PlannedClip:
    """A clip and what is shown of it, before it is decoded.

    Attributes:
        plan: which frames, when, how large.
        file: what its file holds; None for a list of pictures.
        packets: of the file, where they were just read.
    """

    clip: Clip
    plan: FramePlan
    file: VideoFile | None = None
    packets: Packets | None = None


@dataclass(frozen=True)
class DecodedClip:
    """A clip as the model is shown it.

    Attributes:
        plan: which frames, when, how large.
        frames: (T, plan.height, plan.width, 3) uint8.
    """

    plan: FramePlan
    frames: np.ndarray


class OutdatedPlan(Exception):
    """A file yields other frames than were planned. What it holds was learnt: plan its clip anew.

    Attributes:
        clip: planned anew.
    """

    def __init__(self, clip: PlannedClip) -> None:
        super().__init__(f"{clip.clip} yields other frames than were planned")
        self.clip = clip


def as_clip(video: Any) -> Clip:
    """A clip.

    Args:
        video: one, a path, a file object, bytes, or a list of frame pictures.
    """
    if isinstance(video, Clip):
        return video
    if isinstance(video, str | os.PathLike):
        return Clip(path=os.fspath(video))
    if isinstance(video, list | tuple):
        return Clip(frames=tuple(video))
    if isinstance(video, bytes):
        video = io.BytesIO(video)
    if not hasattr(video, "read"):
        raise ClipError(f"a {type(video).__name__} is no video; a path, a file object or frame pictures are needed")
    return Clip(path=video)


def spooled(stream: Any, most: int, timeout: float | None) -> BinaryIO:
    """What a stream holds that cannot be read twice, such as the answer to a request; on disk if it is large.

    Args:
        most: bytes that it may have.
        timeout: seconds that it may take; looked at after each part that arrives.

    Raises:
        ClipError: if it has more, or takes longer.
    """
    tick = deadline(timeout, "the remote clip took more than video_timeout, {:g} s, to arrive")
    file = tempfile.SpooledTemporaryFile(max_size=1 << 24)  # noqa: SIM115 - it goes with the clip
    while part := stream.read(1 << 20):
        if file.tell() + len(part) > most:
            raise ClipError(f"the remote clip has more than video_remote_gb, {most / GIB:g} GiB")
        tick()
        file.write(part)
    file.seek(0)
    return file


@contextlib.contextmanager
def _naming(clip: Clip) -> Iterator[None]:
    """Errors name the clip."""
    try:
        yield
    except (SamplingError, ClipError) as error:
        raise ClipError(f"{clip}: {error}") from error


class ClipReader:
    """Plans and reads clips as one recipe says.

    Args:
        sampling: the recipe's; a clip's own settings override it.
        cache: of decoded frames; None: each clip is decoded whenever it is read.
        timeout: seconds that reading one clip may take; None: any time.
        remote: bytes that a clip may have which comes as a stream or is fetched.
        may_fetch: fetch clips and pictures at addresses, into the cache.
        threads: for the decoder; None: a fair share of the machine's cores, at most 4.
    """

    def __init__(
        self,
        sampling: Sampling,
        cache: FrameCache | None = None,
        timeout: float | None = 300.0,
        threads: int | None = None,
        remote: int = 2 * GIB,
        may_fetch: bool = False,
    ) -> None:
        self.sampling, self.cache, self.timeout, self.threads = sampling, cache, timeout, threads
        self.remote, self.may_fetch = remote, may_fetch
        self._files: dict[str, VideoFile] = {}
        self._packets: dict[tuple[str, tuple[int, int]], Packets] = {}
        self._uploads: WeakKeyDictionary[Any, DecodedClip] = WeakKeyDictionary()

    def __reduce__(self) -> tuple:
        return ClipReader, (self.sampling, self.cache, self.timeout, self.threads, self.remote, self.may_fetch)

    def plan(self, video: Any) -> PlannedClip:
        """What is shown of a clip, without decoding it.

        Args:
            video: see `as_clip`.

        Raises:
            ClipError: naming the clip, if it cannot be read or shown.
        """
        clip = self._seekable(as_clip(video))
        with _naming(clip):
            local = self._local(clip)
            return replace(self._plan(local, *self._file(local)), clip=clip)

    def decode(self, planned: PlannedClip) -> DecodedClip:
        """The frames of a plan.

        Raises:
            OutdatedPlan: if the file yields others, so that the prompt has to be built anew.
            ClipError: naming the clip, if it cannot be decoded.
        """
        with _naming(planned.clip):
            clip, file = self._local(planned.clip), planned.file
            try:
                return DecodedClip(planned.plan, self._frames(replace(planned, clip=clip)))
            except DisagreementError as error:
                assert file is not None  # pictures have nothing to disagree with
                if isinstance(clip.path, str) and file_stamp(clip.path) != file.stamp:
                    anew = self._file(clip)
                elif file.positions:
                    raise ClipError(f"decodes differently each time ({error}); is it damaged?") from error
                else:
                    anew = self._count(clip, file), None
                raise OutdatedPlan(replace(self._plan(clip, *anew), clip=planned.clip)) from error

    def read(self, video: Any) -> DecodedClip:
        """A clip's plan and its frames, which agree.

        An upload is decoded once, however often it is asked for.

        Raises:
            ClipError: naming the clip, if it cannot be read or shown.
        """
        is_upload = hasattr(video, "read")
        if is_upload and video in self._uploads:
            return self._uploads[video]
        planned = self.plan(video)
        for _ in range(ATTEMPTS):
            try:
                decoded = self.decode(planned)
            except OutdatedPlan as outdated:
                planned = outdated.clip
                continue
            if is_upload:
                self._uploads[video] = decoded
            return decoded
        raise ClipError(f"{planned.clip}: changes while it is read")

    def store(self, planned: PlannedClip) -> bool:
        """Have a clip's frames in the cache.

        Returns:
            Whether they had to be decoded.

        Raises:
            ClipError: naming the clip, if it cannot be decoded.
        """
        with _naming(planned.clip):
            key = self._key(replace(planned, clip=self._local(planned.clip)))
        if key is not None and self.cache.holds(key):
            return False
        self.read(planned.clip)
        return True

    def note(self, clip: Clip) -> str:
        """What a person should know of a clip's file that was read before, such as how much of it is lost."""
        path = self._local(clip).path
        known = self._files.get(path) if isinstance(path, str) else None
        return "" if known is None else known.note

    def at_hand(self, picture: Any) -> Any:
        """A picture, or the file that holds the one at an address.

        Raises:
            ClipError: if it cannot be fetched.
        """
        if not is_address(picture):
            return picture
        with _naming(Clip(picture)):
            return self._fetched(picture)

    def _local(self, clip: Clip) -> Clip:
        """The clip, with files in place of addresses."""
        if clip.frames:
            if any(map(is_address, clip.frames)):
                return replace(clip, frames=tuple(self._fetched(f) if is_address(f) else f for f in clip.frames))
            return clip
        return replace(clip, path=self._fetched(clip.path)) if is_address(clip.path) else clip

    def _fetched(self, address: str) -> str:
        if not self.may_fetch:
            raise ClipError("is an address; with `remote_media: true` it is fetched, once, into the cache")
        if self.cache is None:
            raise ClipError("is an address, and there is no cache to fetch it into; set `video_cache: true`")
        return self._limited(lambda: self.cache.fetch(address, self.remote, self.timeout), "its server hangs")

    def _seekable(self, clip: Clip) -> Clip:
        stream = clip.path
        if not hasattr(stream, "read") or (hasattr(stream, "seekable") and stream.seekable()):
            return clip
        file = self._limited(lambda: spooled(stream, self.remote, self.timeout), "the remote clip hangs")
        return replace(clip, path=file)

    def _plan(self, clip: Clip, file: VideoFile | None, packets: Packets | None) -> PlannedClip:
        sampling = self.sampling.override(**clip.settings)
        info = _pictures_info(clip, sampling.fps) if file is None else file.info
        if file is not None and file.note and info.num_frames < sampling.min_frames:
            raise ClipError(f"{file.note}, fewer than video_min_frames, {sampling.min_frames}; replace it")
        return PlannedClip(clip, plan_frames(info, sampling, clip.start, clip.end), file, packets)

    def _file(self, clip: Clip) -> tuple[VideoFile | None, Packets | None]:
        """The facts of a clip's file, from memory, from the cache or from its packets; and these where they are known."""
        if clip.frames:
            return None, None
        path = clip.path
        if not isinstance(path, str):
            return self._limited(lambda: probe(path, self.timeout))  # an upload has no name to remember it by
        stamp = file_stamp(path)
        known = self._files.get(path)
        if known is not None and known.stamp == stamp:
            return known, self._packets.get((path, stamp))
        file, packets = None if self.cache is None else self.cache.read_file(path, stamp), None
        stored = file is not None
        if file is None:
            file, packets = self._limited(lambda: probe(path, self.timeout))
            while len(self._packets) >= _KNOWN_PACKETS:
                self._packets.pop(next(iter(self._packets)), None)
            self._packets[path, file.stamp] = packets
        if known is not None:
            logger.warning("%s has been replaced since it was last read; it is read again.", path)
        if file.note:
            logger.warning("%s: %s.", path, file.note)
        self._keep(path, file, stored)
        return file, packets

    def _keep(self, path: str, file: VideoFile, stored: bool = False) -> None:
        """Remember a file's facts, on disk too if they are not stored there."""
        if len(self._files) >= _KNOWN_FILES:
            self._files.pop(next(iter(self._files)))
        if self.cache is not None and not stored:
            self.cache.write_file(path, file)
        self._files[path] = file

    def _count(self, clip: Clip, file: VideoFile) -> VideoFile:
        """Learn from decoding it all what a file holds whose packets told it wrong."""
        counted = self._limited(lambda: count_by_decoding(clip.path, file, self.timeout))
        if counted.note != file.note:
            logger.warning("%s: %s.", clip, counted.note)
        if isinstance(clip.path, str):
            self._keep(clip.path, counted)
        return counted

    def _key(self, planned: PlannedClip) -> str | None:
        """The key of the plan's frames in the cache; None for uploads, and if there is no cache."""
        clip, file, plan = planned.clip, planned.file, planned.plan
        if self.cache is None:
            return None
        if file is None:
            pictures = [clip.frames[i] for i in plan.indices]
            if not all(isinstance(picture, str) for picture in pictures):
                return None
            return frame_key([content_hash(picture, file_stamp(picture)) for picture in pictures], None, plan)
        if not isinstance(clip.path, str):
            return None
        if not file.content:
            file = replace(file, content=content_hash(clip.path, file.stamp))
            self._keep(clip.path, file)
        return frame_key([file.content], file, plan)

    def _frames(self, planned: PlannedClip) -> np.ndarray:
        clip, file, plan = planned.clip, planned.file, planned.plan
        shape = (len(plan.indices), plan.height, plan.width, 3)
        key = self._key(planned)
        frames = None if key is None else self.cache.read(key, shape)
        if frames is not None:
            return frames
        if file is None:
            pictures = [np.asarray(open_picture(clip.frames[i])) for i in plan.indices]
            frames = np.stack([resize_frame(picture, plan) for picture in pictures])
            if key is not None and key != self._key(planned):
                raise ClipError("its pictures are replaced while they are read")
        else:
            threads = fair_threads() if self.threads is None else self.threads
            frames = self._limited(
                lambda: decode_frames(clip.path, file, plan, planned.packets, threads, self.timeout)
            )
            if isinstance(clip.path, str) and file_stamp(clip.path) != file.stamp:
                raise DisagreementError("was replaced while it was read")
        if key is not None:
            self.cache.write(key, frames, str(clip))
        return frames

    def _limited(self, work: Callable[[], Result], what: str = "the decoder hangs") -> Result:
        """Do a piece of reading in a thread of its own, and leave it behind if it hangs inside a decoder."""
        if self.timeout is None:
            return work()
        try:
            # The decoder looks at the time itself between two packets; a little longer for it to say so.
            return start(work)(self.timeout + 1)
        except TimeoutError:
            raise ClipError(f"{what}: nothing came within video_timeout, {self.timeout:g} s") from None


@functools.lru_cache(maxsize=65536)
def _picture_size(path: str, stamp: tuple[int, int]) -> tuple[int, int]:
    return picture_size(path)


def _pictures_info(clip: Clip, default_rate: float) -> ClipInfo:
    sizes = {
        _picture_size(frame, file_stamp(frame)) if isinstance(frame, str) else picture_size(frame)
        for frame in clip.frames
    }
    if len(sizes) > 1:
        raise ClipError(f"frames differ in size, {sorted(sizes)} (h, w); they must have the same size")
    height, width = sizes.pop()
    count = len(clip.frames)
    times = tuple(time - clip.times[0] for time in clip.times)
    # LLaMA-Factory takes a list without a rate to be sampled already, at video_fps.
    rate = mean_rate(count, times[-1]) if len(times) > 1 else clip.frame_rate or default_rate
    return ClipInfo(count, rate, count / rate, height, width, times, pictures=True)
