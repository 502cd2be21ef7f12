"""The clips and fields of a record, checked."""

import functools
import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ..media import ROLES, WHOLE_SETTINGS, Clip, is_address
from .json_text import quote, read_json


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a record: where, what was found, what would be right."""

    field: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.field}: {self.found}; {self.expected}"


@dataclass(frozen=True)
class RecordKeys:
    """Names of a record's fields beyond the usual ones, from `columns` and `tags` in dataset_info.json.

    `unknown` is what becomes of other fields: warn, error or ignore.
    """

    messages: tuple[str, ...] = ("conversations", "messages")
    videos: tuple[str, ...] = ("video", "videos")
    images: tuple[str, ...] = ("image", "images")
    system: tuple[str, ...] = ("system",)
    tools: tuple[str, ...] = ("tools",)
    role: tuple[str, ...] = ("from", "role")
    content: tuple[str, ...] = ("value", "content")
    roles: tuple[tuple[str, str], ...] = tuple(ROLES.items())
    unknown: str = "warn"


VIDEO_FILES = frozenset(
    [
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".flv",
        ".ts",
        ".mts",
        ".m2ts",
        ".mpg",
        ".mpeg",
        ".vob",
        ".wmv",
        ".asf",
        ".3gp",
        ".ogv",
        ".gif",
    ]
)


def is_video_name(path: str) -> bool:
    """Whether a name ends as those of video files do; pictures may be GIFs too, and are not meant."""
    return os.path.splitext(path)[1].lower() in VIDEO_FILES - {".gif"}


class ClipParser:
    """Reads the clips of one record, collecting every problem on the way."""

    def __init__(self, keys: RecordKeys, find: Callable[[str], str | None], indent: int | None) -> None:
        self.keys, self.find, self.indent = keys, find, indent
        self.problems: list[Problem] = []
        self.unlearnt: list[int] = []  # see Conversation
        self.notes: list[str] = []

    def wrong(self, field: str, found: str, expected: str) -> None:
        self.problems.append(Problem(field, found, expected))

    def pick(self, record: dict, names: tuple[str, ...], where: str = "") -> tuple[str, Any]:
        """The one field of `names` that the record has, as (name, value); value None if it has none."""
        present = [name for name in names if record.get(name) is not None]
        if len(present) > 1:
            self.wrong(where + present[1], f"stands beside {present[0]}", "keep one of the two")
        return (present[0], record[present[0]]) if present else (names[0], None)

    def number(self, value: Any, field: str, least: float, whole: bool) -> float | int | None:
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or (whole and value % 1):
            self.wrong(field, quote(value), "a whole number is needed" if whole else "a number is needed")
        elif not least <= value < math.inf:
            self.wrong(field, quote(value), f"it must be at least {least:g}")
        else:
            return int(value) if whole else float(value)
        return None

    def media_path(self, value: Any, field: str, kind: str) -> str | None:
        if not isinstance(value, str) or not value:
            self.wrong(field, quote(value), f"the path of a {kind} is needed")
            return None
        if value.startswith("file://"):
            value = value[len("file://") :]
        if is_address(value) or value.startswith("data:"):
            remote = getattr(self.find, "remote", None)
            if remote and not value.startswith("data:"):
                return value
            way = "give its path" if remote is None else "give its path; or set `remote_media: true`"
            self.wrong(field, quote(value), f"addresses are not fetched; download the file and {way}")
            return None
        path = self.find(value)
        if path is None:
            explain = getattr(self.find, "explain", None)
            why = f" ({explain(value)})" if explain else ""
            self.wrong(field, f"no file {quote(value)}", f"give a path relative to media_dir, or an absolute one{why}")
        return path

    def clip(self, value: Any, field: str) -> Clip | None:
        """A path, a list of frame pictures, or an object with settings."""
        if isinstance(value, str):
            path = self.media_path(value, field, "video")
            return None if path is None else Clip(path=path)
        if isinstance(value, list):
            named = next((each for each in value if isinstance(each, str) and is_video_name(each)), None)
            if named is not None:
                self.wrong(
                    field,
                    quote(value),
                    f"{named} is a video; a list in the list of clips holds frames: one pair of brackets less",
                )
                return None
            value = {"frames": value}
        if not isinstance(value, dict):
            self.wrong(field, quote(value), "a path, a list of frame pictures or an object with `path` is needed")
            return None
        known = [f.name for f in fields(Clip)]
        value = self.utils_names(value, field)
        for key in value:
            if key not in known:
                self.wrong(f"{field}.{key}", "unknown setting", f"known are {', '.join(known)}")
        frames = value.get("frames") or []
        if ("path" in value) == bool(frames):
            self.wrong(field, quote(value), "exactly one of `path` and `frames` is needed")
            return None
        if not isinstance(frames, list):
            self.wrong(f"{field}.frames", quote(frames), "a list of picture paths is needed")
            return None
        path = self.media_path(value["path"], f"{field}.path", "video") if "path" in value else None
        pictures = [self.media_path(frame, f"{field}.frames[{i}]", "picture") for i, frame in enumerate(frames)]
        times = value.get("times") or []
        if not isinstance(times, list):
            self.wrong(f"{field}.times", quote(times), "a list of seconds is needed")
            times = []
        seconds = [self.number(time, f"{field}.times[{i}]", 0, whole=False) for i, time in enumerate(times)]
        if times and len(times) != len(frames):
            self.wrong(f"{field}.times", f"{len(times)} times", f"one for each of the {len(frames)} frames is needed")
        if None not in seconds and any(b <= a for a, b in itertools.pairwise(seconds)):
            self.wrong(f"{field}.times", quote(times), "times must increase from frame to frame")
        if times and value.get("frame_rate") is not None:
            self.wrong(f"{field}.frame_rate", "stands beside times", "keep one of the two")
        if path is not None and (times or value.get("frame_rate") is not None):
            self.wrong(field, "frame_rate or times with a video file", "they belong to `frames`; a file has its own")
        settings = {
            "frame_rate": self.number(value.get("frame_rate"), f"{field}.frame_rate", 1e-6, whole=False),
            "start": self.number(value.get("start"), f"{field}.start", 0, whole=False),
            "end": self.number(value.get("end"), f"{field}.end", 0, whole=False),
            "fps": self.number(value.get("fps"), f"{field}.fps", 1e-6, whole=False),
        }
        for key in WHOLE_SETTINGS:
            settings[key] = self.number(value.get(key), f"{field}.{key}", 1, whole=True)
        if settings["fps"] is not None and settings["nframes"] is not None:
            self.wrong(f"{field}.nframes", "stands beside fps", "keep one of the two")
        if settings["end"] is not None and settings["end"] <= (settings["start"] or 0):
            self.wrong(f"{field}.end", quote(value["end"]), f"it must be after start, {settings['start'] or 0:g} s")
        if None in pictures or None in seconds or (path is None and not frames):
            return None
        return Clip(path=path, frames=tuple(pictures), times=tuple(seconds), **settings)

    def utils_names(self, clip: dict, field: str) -> dict:
        """A clip's settings, those under qwen-vl-utils' names under ours."""
        names = {"video": "path", "video_start": "start", "video_end": "end"}
        clip = {names.get(key, key) if names.get(key) not in clip else key: item for key, item in clip.items()}
        sampled, raw = clip.pop("sample_fps", None), clip.pop("raw_fps", None)
        if sampled is None and raw is None:
            return clip
        if clip.get("frames"):
            return {**clip, "frame_rate": sampled if raw is None else raw}
        if raw is not None:
            self.wrong(f"{field}.raw_fps", quote(raw), "it belongs to a list of frames; a file has its own frame rate")
        elif "fps" in clip:
            self.wrong(f"{field}.sample_fps", "stands beside fps", "keep fps")
        else:
            self.notes.append("sample_fps of a video file, which qwen-vl-utils does not read, is taken as fps")
            clip["fps"] = sampled
        return clip


class _AnyPath:
    """Takes every path, and addresses: who reads the clip says whether they are fetched."""

    remote = True

    def __call__(self, path: str) -> str:
        return path


def decode_clip(text: str) -> Clip:
    """The clip that `Clip.encode` wrote. A person may have written it too, into chat or a record of another format.

    Raises:
        ValueError: saying what is wrong with its settings.
    """
    return decode_planned_clip(text)[0]


@functools.lru_cache(maxsize=65536)
def decode_planned_clip(text: str) -> tuple[Clip, str]:
    """The same, and the digest of the plan that was stored with it, or ""."""
    given, problems = read_json(text) if text.startswith("{") else (None, ["a path"])
    if problems:  # a path may begin with a brace, too
        return Clip(path=text), ""
    plan_digest = given.pop("planned", "")
    parser = ClipParser(RecordKeys(), find=_AnyPath(), indent=None)
    clip = parser.clip(given, "clip")
    if parser.problems:
        raise ValueError("; ".join(map(str, parser.problems)))
    return clip, plan_digest
