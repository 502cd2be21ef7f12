"""The record format `video_conversation`, checked at the border.

A record is a JSON object with turns and the clips and images that they show:

    {"video": "wzry/4/1.mp4",
     "conversations": [{"from": "human", "value": "<video>\\n描述这个视频并进行打标,使用json输出标签"},
                       {"from": "gpt", "value": {"video_description": "……", "tags": ["王者荣耀"]}}]}

`parse_record` makes a `Conversation` of it, or says everything that is wrong with it.
"""

import difflib
import functools
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..video.sampling import Sampling

VIDEO_PLACEHOLDER = "<video>"
IMAGE_PLACEHOLDER = "<image>"
# Tokens by which the prompt is laid out. Inside a text they would shift turns, or counts of visual tokens.
LAYOUT_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

USER, ASSISTANT, SYSTEM, TOOL, FUNCTION = "user", "assistant", "system", "observation", "function"
ROLES = {
    "human": USER,
    "user": USER,
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "system": SYSTEM,
    "tool": TOOL,
    "observation": TOOL,
    "function_call": FUNCTION,
}


# Settings of a clip that stand in place of the recipe's, under their names in `Sampling`.
_WHOLE_SETTINGS = (
    "min_frames",
    "max_frames",
    "min_pixels",
    "max_pixels",
    "total_pixels",
    "nframes",
    "resized_height",
    "resized_width",
)
_OWN_SETTINGS = ("fps", *_WHOLE_SETTINGS)


class RawNumber(float):
    """A JSON number that remembers how its author wrote it: 1.0 stays 1.0, 1e3 stays 1e3."""

    text: str

    def __new__(cls, text: str) -> "RawNumber":
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __reduce__(self) -> tuple:
        return RawNumber, (self.text,)


class RecordDecoder(json.JSONDecoder):
    """Reads JSON values, numbers as `RawNumber`.

    What is not JSON and yet can be read past (NaN, a key twice in one object) goes into `problems`, so that one wrong
    record does not hide those after it.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        super().__init__(
            parse_float=RawNumber,
            parse_int=RawNumber,
            parse_constant=self._constant,
            object_pairs_hook=self._unique_keys,
        )

    def _constant(self, name: str) -> None:
        self.problems.append(f"{name} is not JSON")

    def _unique_keys(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            self.problems.append(f"the key {json.dumps(twice, ensure_ascii=False)} stands twice in one object")
        return keys


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON text of a value read by `RecordDecoder`: its author's keys, order, numbers and characters.

    Args:
        indent: spaces for each level, or None for one line.
    """
    pad, inner = ("", "") if indent is None else ("\n", "\n" + " " * indent)
    if isinstance(value, dict | list):
        opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
        if not value:
            return opening + closing
        if isinstance(value, dict):
            items = [f"{json_text(str(key))}: {json_text(item, indent)}" for key, item in value.items()]
        else:
            items = [json_text(item, indent) for item in value]
        if indent is None:
            return opening + ", ".join(items) + closing
        # A string never holds a raw line break in JSON, so each one here is a line of a nested value.
        return opening + inner + f",{inner}".join(item.replace("\n", inner) for item in items) + pad + closing
    if isinstance(value, RawNumber):
        return value.text
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Clip:
    """A clip of a record: a file or a list of frame pictures, with its own settings.

    Attributes:
        path: the video file; None if `frames` are given.
        frames: pictures in order, (n,).
        frame_rate: pictures per second of `frames`.
        times: seconds of each of `frames`, increasing, (n,).
        start, end: seconds; only what lies in [start, end) is the clip, and its times count from its first frame.
        fps, min_frames, max_frames, min_pixels, max_pixels, total_pixels: override the recipe's video_* keys.
        nframes, resized_height, resized_width: number of frames, and their size in pixels, in `qwen_vl_utils`.
        planned: `plan_digest` of what its prompt tells, where that was made ahead; no record sets it.
    """

    path: str | None = None
    frames: tuple[str, ...] = ()
    frame_rate: float | None = None
    times: tuple[float, ...] = ()
    start: float | None = None
    end: float | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    nframes: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    planned: str | None = None

    def sampling(self, recipe: Sampling) -> Sampling:
        """How this clip is sampled: its own settings over the recipe's."""
        return recipe.override(**{name: getattr(self, name) for name in _OWN_SETTINGS})

    def __str__(self) -> str:
        """The clip in an error message."""
        if self.frames:
            name = f"{self.frames[0]} … ({len(self.frames)} frames)"
        else:
            name = self.path if isinstance(self.path, str) else "the uploaded clip"
        if self.start is None and self.end is None:
            return name
        end = "…" if self.end is None else f"{self.end:g} s"
        return f"{name} from {self.start or 0:g} s to {end}"

    def encode(self) -> str:
        """One string, which `decode_clip` reads: the path alone where nothing else is set."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) not in (None, ())}
        if list(given) == ["path"] and not self.path.startswith("{"):
            return self.path
        return json.dumps(given, ensure_ascii=False)


@functools.lru_cache(maxsize=65536)
def decode_clip(text: str) -> Clip:
    """The clip that `Clip.encode` wrote. A person may have written it too, into chat or a record of another format.

    Raises:
        ValueError: saying what is wrong with its settings.
    """
    given, problems = read_json(text) if text.startswith("{") else (None, ["a path"])
    if problems:  # a path may begin with a brace, too
        return Clip(path=text)
    planned = given.pop("planned", None)
    parser = _RecordParser(RecordKeys(), find=lambda path: path, indent=None)
    clip = parser.clip(given, "clip")
    if parser.problems:
        raise ValueError("; ".join(map(str, parser.problems)))
    return replace(clip, planned=planned)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a record: where, what was found, what would be right."""

    field: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.field}: {self.found}; {self.expected}"


@dataclass
class Conversation:
    """A checked record.

    Attributes:
        messages: (role, text) in order; placeholders stand where clips and images are shown.
        images: picture paths, in order of their placeholders.
        videos: clips, in order of their placeholders.
        system: the system prompt, or "".
        tools: JSON text of the tools on offer, or "".
        notes: what was read otherwise than it stands, for a person.
    """

    messages: list[tuple[str, str]]
    images: list[str] = field(default_factory=list)
    videos: list[Clip] = field(default_factory=list)
    system: str = ""
    tools: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RecordKeys:
    """Names of a record's fields beyond the usual ones, from `columns` and `tags` in dataset_info.json."""

    messages: tuple[str, ...] = ("conversations", "messages")
    videos: tuple[str, ...] = ("video", "videos")
    images: tuple[str, ...] = ("image", "images")
    system: tuple[str, ...] = ("system",)
    tools: tuple[str, ...] = ("tools",)
    role: tuple[str, ...] = ("from", "role")
    content: tuple[str, ...] = ("value", "content")
    roles: tuple[tuple[str, str], ...] = tuple(ROLES.items())


def read_json(text: str) -> tuple[Any, list[str]]:
    """A JSON value, and what is wrong with it; the value holds only if nothing is."""
    decoder = RecordDecoder()
    try:
        value = decoder.decode(text)
        # A lone surrogate (\ud800) is JSON, but no text: it could be neither stored nor tokenized.
        if "\\u" in text:
            json_text(value).encode()
        return value, decoder.problems
    except UnicodeEncodeError:
        return None, ["holds half a surrogate pair (\\ud800 … \\udfff), which is no character"]
    except RecursionError:
        return None, ["nested too deeply"]
    except json.JSONDecodeError as error:
        return None, [f"not JSON: {error.msg} at character {error.pos}"]


def show(value: Any, limit: int = 60) -> str:
    """A value as it looks in an error message."""
    text = json_text(value) if isinstance(value, dict | list | str | bool | RawNumber | None) else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def is_text_items(value: Any) -> bool:
    """Whether a value is OpenAI's list of text items and nothing else."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(i, dict) and i.keys() == {"type", "text"} and i["type"] == "text" for i in value)
    )


def strip_around_placeholders(text: str) -> str:
    """The text of a human turn as the official trainer uses it: each piece around a placeholder stripped.

    `<video>\\n描述…` becomes the clip followed directly by 描述…, as in the usual inference message.
    """
    return "".join(piece.strip() for piece in re.split(f"({IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER})", text))


@functools.lru_cache(maxsize=4096)
def misspelt(key: str, known: tuple[str, ...]) -> str | None:
    """The known name that a key differs from by a slip; other fields a record may have as it likes."""
    close = difflib.get_close_matches(key, known, 1, 0.8)
    return close[0] if close and abs(len(close[0]) - len(key)) <= 1 else None


class _RecordParser:
    """Reads one record, collecting every problem on the way."""

    def __init__(self, keys: RecordKeys, find: Callable[[str], str | None], indent: int | None) -> None:
        self.keys, self.find, self.indent = keys, find, indent
        self.problems: list[Problem] = []
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
            self.wrong(field, show(value), "a whole number is needed" if whole else "a number is needed")
        elif not least <= value < math.inf:
            self.wrong(field, show(value), f"it must be at least {least:g}")
        else:
            return int(value) if whole else float(value)
        return None

    def media_path(self, value: Any, field: str, kind: str) -> str | None:
        if not isinstance(value, str) or not value:
            self.wrong(field, show(value), f"the path of a {kind} is needed")
            return None
        if value.startswith("file://"):
            value = value[len("file://") :]
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://|data:", value):
            self.wrong(field, show(value), "addresses are not fetched; download the file and give its path")
            return None
        path = self.find(value)
        if path is None:
            self.wrong(field, f"no file {show(value)}", "give a path relative to media_dir, or an absolute one")
        return path

    def clip(self, value: Any, field: str) -> Clip | None:
        """A path, a list of frame pictures, or an object with settings."""
        if isinstance(value, str):
            path = self.media_path(value, field, "video")
            return None if path is None else Clip(path=path)
        if isinstance(value, list):
            value = {"frames": value}
        if not isinstance(value, dict):
            self.wrong(field, show(value), "a path, a list of frame pictures or an object with `path` is needed")
            return None
        known = [f.name for f in fields(Clip) if f.name != "planned"]
        value = self.utils_names(value, field)
        for key in value:
            if key not in known:
                self.wrong(f"{field}.{key}", "unknown setting", f"known are {', '.join(known)}")
        frames = value.get("frames") or []
        if ("path" in value) == bool(frames):
            self.wrong(field, show(value), "exactly one of `path` and `frames` is needed")
            return None
        if not isinstance(frames, list):
            self.wrong(f"{field}.frames", show(frames), "a list of picture paths is needed")
            return None
        path = self.media_path(value["path"], f"{field}.path", "video") if "path" in value else None
        pictures = [self.media_path(frame, f"{field}.frames[{i}]", "picture") for i, frame in enumerate(frames)]
        times = value.get("times") or []
        if not isinstance(times, list):
            self.wrong(f"{field}.times", show(times), "a list of seconds is needed")
            times = []
        seconds = [self.number(time, f"{field}.times[{i}]", 0, whole=False) for i, time in enumerate(times)]
        if times and len(times) != len(frames):
            self.wrong(f"{field}.times", f"{len(times)} times", f"one for each of the {len(frames)} frames is needed")
        if None not in seconds and any(b <= a for a, b in itertools.pairwise(seconds)):
            self.wrong(f"{field}.times", show(times), "times must increase from frame to frame")
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
        for key in _WHOLE_SETTINGS:
            settings[key] = self.number(value.get(key), f"{field}.{key}", 1, whole=True)
        if settings["fps"] is not None and settings["nframes"] is not None:
            self.wrong(f"{field}.nframes", "stands beside fps", "keep one of the two")
        if settings["end"] is not None and settings["end"] <= (settings["start"] or 0):
            self.wrong(f"{field}.end", show(value["end"]), f"it must be after start, {settings['start'] or 0:g} s")
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
            self.wrong(f"{field}.raw_fps", show(raw), "it belongs to a list of frames; a file has its own frame rate")
        elif "fps" in clip:
            self.wrong(f"{field}.sample_fps", "stands beside fps", "keep fps")
        else:
            self.notes.append("sample_fps of a video file, which qwen-vl-utils does not read, is taken as fps")
            clip["fps"] = sampled
        return clip

    def content_items(self, items: list, field: str, images: list, videos: list) -> str:
        """Content in the OpenAI style, a list of text, image and video items, as text with placeholders."""
        text = ""
        for i, item in enumerate(items):
            where = f"{field}[{i}]"
            kind = item.get("type") if isinstance(item, dict) else None
            if kind == "text" and isinstance(item.get("text"), str):
                if IMAGE_PLACEHOLDER in item["text"] or VIDEO_PLACEHOLDER in item["text"]:
                    self.wrong(
                        f"{where}.text", show(item["text"]), "in a list, media stand as items, not as placeholders"
                    )
                text += item["text"]
            elif kind in ("image", "image_url"):
                value = item.get(kind)
                value = value.get("url") if isinstance(value, dict) else value
                for key in item.keys() - {"type", kind}:
                    self.wrong(f"{where}.{key}", "unknown setting", "images have no settings of their own")
                images.append(self.media_path(value, f"{where}.{kind}", "picture"))
                text += IMAGE_PLACEHOLDER
            elif kind in ("video", "video_url"):
                value = item.get(kind)
                value = value.get("url") if isinstance(value, dict) and "url" in value else value
                # Settings may stand beside the clip, as in messages for qwen-vl-utils.
                settings = {key: item[key] for key in item if key not in ("type", kind)}
                if settings and not isinstance(value, dict):
                    value = {"frames" if isinstance(value, list) else "path": value}
                videos.append(self.clip({**value, **settings} if settings else value, f"{where}.{kind}"))
                text += VIDEO_PLACEHOLDER
            else:
                self.wrong(where, show(item), 'an item {"type": "text"|"image"|"video", …} is needed')
        return text

    def turn_text(self, role: str, value: Any, field: str, key: str, images: list, videos: list) -> str:
        # Only OpenAI's `content` is a list of items; elsewhere an assistant's list is the answer itself.
        as_items = isinstance(value, list) and (key == "content" or is_text_items(value))
        if as_items and role in (ASSISTANT, SYSTEM) and any(isinstance(i, dict) and "type" in i for i in value):
            texts = [item.get("text") if isinstance(item, dict) and item["type"] == "text" else None for item in value]
            if all(isinstance(text, str) for text in texts):
                return "".join(texts)
            self.wrong(field, show(value), 'items {"type": "text", "text": …} alone are needed here')
            return ""
        if role == ASSISTANT and value is not None and not isinstance(value, str):
            return json_text(value, self.indent)
        if role == FUNCTION and value is not None:
            return self.function_text(value, field)
        if isinstance(value, list) and role != SYSTEM:
            return self.content_items(value, field, images, videos)
        if not isinstance(value, str):
            self.wrong(field, show(value), "a text is needed")
            return ""
        return strip_around_placeholders(value) if role == USER else value

    def turns(self, record: dict, images: list, videos: list) -> list[tuple[str, str]]:
        name, turns = self.pick(record, self.keys.messages)
        if not isinstance(turns, list) or not turns:
            found = "missing" if turns is None else show(turns)
            self.wrong(name, found, 'a list of turns {"from": "human"|"gpt", "value": …} is needed')
            return []
        messages = []
        roles = dict(self.keys.roles)
        for i, turn in enumerate(turns):
            where = f"{name}[{i}]"
            if not isinstance(turn, dict):
                self.wrong(where, show(turn), 'an object {"from": …, "value": …} is needed')
                continue
            role_key, role_name = self.pick(turn, self.keys.role, f"{where}.")
            content_key, value = self.pick(turn, self.keys.content, f"{where}.")
            role = roles.get(role_name) if isinstance(role_name, str) else None
            if role is None:
                found = "missing" if role_name is None else f"unknown role {show(role_name)}"
                self.wrong(f"{where}.{role_key}", found, f"known are {', '.join(roles)}")
                continue
            field = f"{where}.{content_key}"
            if turn.get("reasoning_content"):
                self.wrong(f"{where}.reasoning_content", "a thought", "write it into the content: <think>…</think>…")
            if turn.get("tool_calls"):
                said = self.turn_text(role, value, field, content_key, images, videos) if value else ""
                role, field, value = (
                    FUNCTION,
                    f"{where}.tool_calls",
                    {"content": said, "tool_calls": turn["tool_calls"]},
                )
            text = self.turn_text(role, value, field, content_key, images, videos)
            if not text.strip() and not any(problem.field == field for problem in self.problems):
                self.wrong(field, "empty", "a text is needed")
            if role not in (USER, TOOL) and any(mark in text for mark in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)):
                self.wrong(field, f"a placeholder in a {role_name} turn", "clips and images are shown in human turns")
            self.check_layout(field, text)
            messages.append((role, text))
        if len(messages) == len(turns):
            self.check_order([role for role, _ in messages], name)
        return messages

    def check_layout(self, field: str, text: str) -> None:
        for token in LAYOUT_TOKENS:
            if token in text:
                self.wrong(field, f"holds {token}", "this token lays out the prompt; remove it from the text")

    def function_text(self, value: Any, field: str) -> str:
        """A function_call turn, or OpenAI's tool_calls, as JSON text {"content": …, "tool_calls": [{"function": …}]}."""
        turn = value
        if isinstance(value, str):
            turn, problems = read_json(value)
            if problems:
                self.wrong(field, f"{show(value)}: {problems[0]}", "JSON of a call is needed")
                return value
        if not (isinstance(turn, dict) and "tool_calls" in turn):
            turn = {"content": "", "tool_calls": turn if isinstance(turn, list) else [turn]}
        calls = turn["tool_calls"] if isinstance(turn["tool_calls"], list) else [None]
        functions = [call.get("function", call) if isinstance(call, dict) else None for call in calls]
        if not all(isinstance(f, dict) and isinstance(f.get("name"), str) and "arguments" in f for f in functions):
            self.wrong(field, show(value), 'calls {"name": …, "arguments": {…}} are needed')
        return json_text({"content": turn["content"], "tool_calls": [{"function": f} for f in functions]})

    def check_order(self, roles: list[str], name: str) -> None:
        offset = 1 if roles[:1] == [SYSTEM] else 0
        before = {
            USER: (None, ASSISTANT, FUNCTION),
            ASSISTANT: (USER, TOOL),
            FUNCTION: (USER, TOOL),
            TOOL: (FUNCTION, TOOL),
            SYSTEM: (),
        }
        speaker = {USER: "human", ASSISTANT: "gpt", FUNCTION: "function_call", TOOL: "tool", SYSTEM: "system"}
        previous = None
        for i, role in enumerate(roles[offset:], start=offset):
            if previous not in before[role]:
                found = (
                    f"{speaker[role]} turn after {speaker[previous]} turn"
                    if previous
                    else f"{speaker[role]} turn first"
                )
                self.wrong(f"{name}[{i}]", found, "turns go [system], human, gpt, human, gpt, …")
                return
            previous = role
        if previous is not None and previous not in (ASSISTANT, FUNCTION):
            self.wrong(
                f"{name}[{len(roles) - 1}]", f"ends with a {speaker[previous]} turn", "the last turn must be gpt's"
            )

    def media(self, record: dict, names: tuple[str, ...], kind: str, found: list, counted: int) -> list:
        """Clips or images of the record, checked against the placeholders of its turns."""
        # Another data set's tool may have written an empty list beside the field that is used.
        name, value = self.pick({key: record[key] for key in names if record.get(key) not in (None, [], "")}, names)
        mark = f"<{kind}>"
        if value is None:
            values = []
        elif isinstance(value, list):
            values = value
        else:
            values = [value]
        if found and values:
            self.wrong(name, f"stands beside {kind} items in the turns", "keep one of the two")
            return found
        for i, item in enumerate(values):
            field = name if value is not values else f"{name}[{i}]"
            found.append(self.clip(item, field) if kind == "video" else self.media_path(item, field, "picture"))
        if len(found) != counted:
            counts = f"{len(found)} {kind}(s) and {counted} {mark} in the turns"
            self.wrong(name, counts, f"one {mark} is needed for each")
        return found

    def parse(self, record: Any) -> Conversation:
        if not isinstance(record, dict):
            self.wrong("record", show(record), "a JSON object is needed")
            return Conversation([])
        images: list = []
        videos: list = []
        known = (*self.keys.messages, *self.keys.videos, *self.keys.images, *self.keys.system, *self.keys.tools)
        for key in record:
            if key not in known and (meant := misspelt(key, known)):
                self.wrong(key, "unknown field", f"is {meant} meant?")
        messages = self.turns(record, images, videos)
        shown = "".join(text for role, text in messages if role in (USER, TOOL))
        if messages:
            videos = self.media(record, self.keys.videos, "video", videos, shown.count(VIDEO_PLACEHOLDER))
            images = self.media(record, self.keys.images, "image", images, shown.count(IMAGE_PLACEHOLDER))
        _, system = self.pick(record, self.keys.system)
        if messages and messages[0][0] == SYSTEM:
            if system:
                self.wrong(self.keys.system[0], "stands beside a system turn", "keep one of the two")
            system, messages = messages[0][1], messages[1:]
        if system is not None and not isinstance(system, str):
            self.wrong(self.keys.system[0], show(system), "a text is needed")
            system = None
        self.check_layout(self.keys.system[0], system or "")
        _, tools = self.pick(record, self.keys.tools)
        listed, problems = read_json(tools) if isinstance(tools, str) and tools else (tools or [], [])
        if problems or not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
            self.wrong(self.keys.tools[0], show(tools), "a list of tools, or its JSON text, is needed")
        tools = json_text(listed) if listed else ""
        self.check_layout(self.keys.tools[0], tools)
        return Conversation(messages, images, videos, system or "", tools, self.notes)


def parse_record(
    record: Any,
    find: Callable[[str], str | None],
    keys: RecordKeys = RecordKeys(),
    indent: int | None = None,
) -> tuple[Conversation, list[Problem]]:
    """Check a record and make a conversation of it.

    Args:
        record: what `RecordDecoder` read.
        find: gives the path at which a record's path is found, or None if there is no such file.
        keys: names of the record's fields.
        indent: for answers that are JSON values: spaces a level, or None for one line.

    Returns:
        The conversation, which holds only if there are no problems, and all problems.
    """
    parser = _RecordParser(keys, find, indent)
    conversation = parser.parse(record)
    return conversation, parser.problems


def take_inline_media(messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[str], list[str]]:
    """`<video>path</video>` and `<image>path</image>` in user messages -> placeholders, and the paths in order.

    Returns:
        The messages, paths of videos, paths of images.

    Raises:
        ValueError: if a tag is not closed.
    """
    paths: dict[str, list[str]] = {"video": [], "image": []}

    def place(match: re.Match) -> str:
        paths[match[1]].append(match[2].strip())
        return f"<{match[1]}>"

    taken = []
    for message in messages:
        if message["role"] == USER:
            text = re.sub(r"<(video|image)>((?:(?!<video>|<image>).)*?)</\1>", place, message["content"])
            message = {**message, "content": text}
        taken.append(message)
    shown = "".join(message["content"] for message in taken if message["role"] == USER)
    for kind, found in paths.items():
        if shown.count(f"<{kind}>") != len(found):
            raise ValueError(f"a <{kind}> without its end; write <{kind}>path</{kind}>")
    return taken, paths["video"], paths["image"]
