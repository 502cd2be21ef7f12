"""Records as other tools have them -> ours: ms-swift, LLaVA-Video, VideoChatGPT, alpaca, OpenAI, Qwen's official trainer.

What the record format takes in place of its own fields (parse.py) is taken here too. Beyond that: clips that are named by an
id, questions without a placeholder, and lists of records that are packed into one sample.
"""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from ..media import (
    ASSISTANT,
    FUNCTION,
    IMAGE_PLACEHOLDER,
    SYSTEM,
    TOOL,
    USER,
    VIDEO_PLACEHOLDER,
    Clip,
    Conversation,
)
from .clips import VIDEO_FILES, Problem, is_video_name
from .json_text import json_text, read_json
from .parse import is_text_items, parse_record

_SPEAKERS = {USER: "human", ASSISTANT: "gpt", SYSTEM: "system", TOOL: "observation", FUNCTION: "function_call"}
_CLIP_IDS = ("video_id", "video_name")
_RANKED = ("chosen", "rejected", "rejected_response", "rejected_messages")
_TURNS = ("conversations", "messages")
_ASKED = ("query", "instruction", "question", "q", "Q")


def unpacked(value: Any) -> Iterator[Any]:
    """A record, or the records that Qwen's official trainer has packed into one list."""
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        yield from value
    else:
        yield value


def converted(
    record: Any, find: Callable[[str], str | None], name_of: Callable[[str], str]
) -> tuple[dict[str, Any], list[Problem], list[str]]:
    """A record of another tool as one of ours.

    Args:
        find: gives the path at which a path is found, or None; see `parse_record`.
        name_of: what is written of such a path.

    Returns:
        The record, which holds only if there are no problems; all problems; and what was read otherwise than it stands.
    """
    notes: list[str] = []
    problems = []
    if isinstance(record, dict):
        for name in _RANKED:
            if record.get(name):
                problems.append(Problem(name, "ranking data", "these records are for stage sft: one answer each"))
        record = _with_clip(_lower_names(record), find, notes)
        record = _with_placeholders(record, notes)
    conversation, found = parse_record(record, find)
    return _as_record(conversation, name_of), [*problems, *found], [*notes, *conversation.notes]


def _lower_names(record: dict) -> dict:
    """VideoChatGPT's questions for evaluation have `Q` and `A`."""
    return {{"Q": "q", "A": "a"}.get(name, name): value for name, value in record.items()}


def _with_clip(record: dict, find: Callable[[str], str | None], notes: list[str]) -> dict:
    """A clip that is named by an id, as VideoChatGPT has it, by its file."""
    name = next((name for name in _CLIP_IDS if isinstance(record.get(name), str)), None)
    if name is None or record.get("video") or record.get("videos"):
        return record
    given = record[name]
    endings = ("",) if is_video_name(given) else (".mp4", *sorted(VIDEO_FILES - {".mp4"}))
    file = next((given + ending for ending in endings if find(given + ending) is not None), given + endings[0])
    notes.append(f"{name} is taken as the name of the clip's file")
    return {**{key: value for key, value in record.items() if key != name}, "video": file}


def _with_placeholders(record: dict, notes: list[str]) -> dict:
    """Where no question says where clips and pictures are shown, they come first, as in ms-swift."""
    marks = ""
    for kind, mark in (("video", VIDEO_PLACEHOLDER), ("image", IMAGE_PLACEHOLDER)):
        given = next((record[name] for name in (kind, f"{kind}s") if record.get(name)), [])
        marks += mark * (len(given) if isinstance(given, list) else 1)
    if not marks:
        return record
    history = record.get("history")
    turns = next((record[name] for name in _TURNS if isinstance(record.get(name), list)), None)
    texts = json.dumps([record.get(name) for name in _ASKED] + [turns, history], ensure_ascii=False, default=str)
    if VIDEO_PLACEHOLDER in texts or IMAGE_PLACEHOLDER in texts:
        return record
    notes.append("<video> and <image> are put before the first question, which had none")
    if isinstance(history, list) and history and isinstance(history[0], list) and isinstance(history[0][0], str):
        return {**record, "history": [[marks + history[0][0], *history[0][1:]], *history[1:]]}
    asked = next((name for name in _ASKED if isinstance(record.get(name), str)), None)
    if asked is not None:
        return {**record, asked: marks + record[asked]}
    for name in _TURNS:
        for number, turn in enumerate(record[name] if isinstance(record.get(name), list) else ()):
            text = next((key for key in ("value", "content") if isinstance(turn, dict) and key in turn), None)
            if text and isinstance(turn[text], str) and turn.get("from", turn.get("role")) in ("human", "user"):
                first = {**turn, text: marks + turn[text]}
                return {**record, name: [*record[name][:number], first, *record[name][number + 1 :]]}
    return record


def _as_record(conversation: Conversation, name_of: Callable[[str], str]) -> dict[str, Any]:
    """A checked conversation as a record, which reads as that conversation."""

    def clip(found: Clip | None) -> Any:
        if found is None:
            return None
        settings = found.given
        if "frames" in settings:
            settings["frames"] = [name_of(frame) for frame in found.frames]
            settings |= {"times": list(found.times)} if found.times else {}
        else:
            settings["path"] = name_of(found.path)
        return settings["path"] if list(settings) == ["path"] else settings

    def only(values: list[Any]) -> Any:
        return values[0] if len(values) == 1 else values

    turns = [
        {"from": _SPEAKERS[role], "value": _value(text) if role in (ASSISTANT, FUNCTION) else text}
        | ({"loss": False} if number in conversation.unlearnt else {})
        for number, (role, text) in enumerate(conversation.messages)
    ]
    record = {
        "video": only([clip(each) for each in conversation.videos]),
        "image": only([name_of(each) for each in conversation.images if each is not None]),
        "system": conversation.system,
        "tools": read_json(conversation.tools)[0] if conversation.tools else None,
        "conversations": turns,
    }
    return {name: value for name, value in record.items() if value}


def _value(text: str) -> Any:
    """An answer that is JSON text of an object or a list as such, where that is written as the same text again."""
    if text[:1] not in ("{", "["):
        return text
    value, problems = read_json(text)
    is_answer = not problems and isinstance(value, dict | list) and not is_text_items(value)
    return value if is_answer and json_text(value) == text else text


def relative_to(media_dir: str) -> Callable[[str], str]:
    """What is written of a path that was found: its place below the folder of media, where it lies there."""
    folder = os.path.abspath(media_dir)

    def name_of(path: str) -> str:
        whole = os.path.abspath(path)
        return os.path.relpath(whole, folder).replace(os.sep, "/") if whole.startswith(folder + os.sep) else path

    return name_of
