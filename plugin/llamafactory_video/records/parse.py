"""The record format `video_conversation`, checked at the border.

A record is a JSON object with turns and the clips and images that they show:

    {"video": "wzry/4/1.mp4",
     "conversations": [{"from": "human", "value": "<video>\\n描述这个视频并进行打标,使用json输出标签"},
                       {"from": "gpt", "value": {"video_description": "……", "tags": ["王者荣耀"]}}]}

`parse_record` makes a `Conversation` of it, or says everything that is wrong with it.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ..media import (
    ASSISTANT,
    FUNCTION,
    IMAGE_PLACEHOLDER,
    LAYOUT_TOKENS,
    SYSTEM,
    TOOL,
    USER,
    VIDEO_PLACEHOLDER,
    Clip,
    Conversation,
    strip_around_placeholders,
)
from ..words import slip_of
from .clips import ClipParser, Problem, RecordKeys
from .json_text import json_text, quote, read_json

# Fields of a turn that are read, or that say nothing of what is trained.
_TURN_FIELDS = ("loss", "weight", "reasoning_content", "tool_calls", "tool_call_id", "name")
_CLIP_SETTINGS = tuple(
    name
    for name in (*(f.name for f in fields(Clip)), "video_start", "video_end", "sample_fps", "raw_fps")
    if name not in ("path", "frames")
)
# Question, what is added to it, and answer, where they stand in fields of their own.
_PAIRS = (("query", "", "response"), ("instruction", "input", "output"), ("question", "", "answer"), ("q", "", "a"))
# What else is written in place of turns.
_ELSEWHERE = {
    "caption": 'write turns: a question {"from": "human", "value": "<video>…"}, and the caption as gpt\'s answer',
    "chosen": "ranking data: these templates are for stage sft, which learns from one answer",
}


def is_text_items(value: Any) -> bool:
    """Whether a value is OpenAI's list of text items and nothing else."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(i, dict) and i.keys() == {"type", "text"} and i["type"] == "text" for i in value)
    )


def _records_inside(value: dict, known: tuple[str, ...]) -> str | None:
    """The field of an object that holds records, as a file's wrapping does."""
    for name, held in value.items():
        if name in known:
            continue
        items = list(held.values()) if isinstance(held, dict) else held
        if isinstance(items, list) and items and all(isinstance(item, dict) for item in items):
            return name
        if isinstance(held, dict) and any(key in held for key in ("conversations", "messages")):
            return name
    return None


class _RecordParser(ClipParser):
    """Reads one record, collecting every problem on the way."""

    def content_items(self, items: list, field: str, images: list, videos: list) -> str:
        """Content in the OpenAI style, a list of text, image and video items, as text with placeholders."""
        text = ""
        for i, item in enumerate(items):
            where = f"{field}[{i}]"
            kind = item.get("type") if isinstance(item, dict) else None
            if kind == "text" and isinstance(item.get("text"), str):
                if IMAGE_PLACEHOLDER in item["text"] or VIDEO_PLACEHOLDER in item["text"]:
                    self.wrong(
                        f"{where}.text", quote(item["text"]), "in a list, media stand as items, not as placeholders"
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
                self.wrong(where, quote(item), 'an item {"type": "text"|"image"|"video", …} is needed')
        return text

    def turn_text(self, role: str, value: Any, field: str, key: str, images: list, videos: list) -> str:
        # Only OpenAI's `content` is a list of items; elsewhere an assistant's list is the answer itself.
        as_items = isinstance(value, list) and (key == "content" or is_text_items(value))
        if as_items and role in (ASSISTANT, SYSTEM) and any(isinstance(i, dict) and "type" in i for i in value):
            texts = [item.get("text") if isinstance(item, dict) and item["type"] == "text" else None for item in value]
            if all(isinstance(text, str) for text in texts):
                return "".join(texts)
            self.wrong(field, quote(value), 'items {"type": "text", "text": …} alone are needed here')
            return ""
        if role == ASSISTANT and value is not None and not isinstance(value, str):
            return json_text(value, self.indent)
        if role == FUNCTION and value is not None:
            return self.function_text(value, field)
        if isinstance(value, list) and role != SYSTEM:
            return self.content_items(value, field, images, videos)
        if not isinstance(value, str):
            self.wrong(field, quote(value), "a text is needed")
            return ""
        return strip_around_placeholders(value) if role == USER else value

    def turns(self, record: dict, images: list, videos: list) -> list[tuple[str, str]]:
        name, turns = self.pick(record, self.keys.messages)
        if not isinstance(turns, list) or not turns:
            found = "missing" if turns is None else quote(turns)
            self.wrong(name, found, 'a list of turns {"from": "human"|"gpt", "value": …} is needed')
            return []
        messages = []
        roles = dict(self.keys.roles)
        for i, turn in enumerate(turns):
            where = f"{name}[{i}]"
            if not isinstance(turn, dict):
                self.wrong(where, quote(turn), 'an object {"from": …, "value": …} is needed')
                continue
            role_key, role_name = self.pick(turn, self.keys.role, f"{where}.")
            content_key, value = self.pick(turn, self.keys.content, f"{where}.")
            role = roles.get(role_name) if isinstance(role_name, str) else None
            if role is None:
                found = "missing" if role_name is None else f"unknown role {quote(role_name)}"
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
            if not self.is_learnt(turn, role, where):
                self.unlearnt.append(len(messages))
            self.unread(turn, (*self.keys.role, *self.keys.content, *_TURN_FIELDS), "a turn's ")
            messages.append((role, text))
        if len(messages) == len(turns):
            self.check_order([role for role, _ in messages], name)
        return messages

    def is_learnt(self, turn: dict, role: str, where: str) -> bool:
        """Whether a turn is trained on: `loss` is ms-swift's name, `weight` OpenAI's."""
        name, value = self.pick(turn, ("loss", "weight"), f"{where}.")
        is_answer = role in (ASSISTANT, FUNCTION)
        if value is None:
            return True
        if isinstance(value, str) or value not in (0, 1):
            self.wrong(f"{where}.{name}", quote(value), "true or 1 trains on an answer, false or 0 does not")
        elif value and not is_answer:
            self.wrong(f"{where}.{name}", f"{quote(value)} on what the model is told", "answers alone are trained on")
        return bool(value) or not is_answer

    def unread(self, value: dict, known: tuple[str, ...], of: str = "") -> None:
        """Tell the fields that mean nothing here."""
        for key, given in value.items():
            if key in known or given in (None, "", [], {}) or self.keys.unknown == "ignore":
                continue
            if self.keys.unknown == "error":
                self.wrong(key, f"{of}field that is not read", "remove it, or set `unknown_fields: warn`")
            else:
                self.notes.append(f"{of}field {key} is not read")

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
                self.wrong(field, f"{quote(value)}: {problems[0]}", "JSON of a call is needed")
                return value
        if not (isinstance(turn, dict) and "tool_calls" in turn):
            turn = {"content": "", "tool_calls": turn if isinstance(turn, list) else [turn]}
        calls = turn["tool_calls"] if isinstance(turn["tool_calls"], list) else [None]
        functions = [call.get("function", call) if isinstance(call, dict) else None for call in calls]
        if not all(isinstance(f, dict) and isinstance(f.get("name"), str) and "arguments" in f for f in functions):
            self.wrong(field, quote(value), 'calls {"name": …, "arguments": {…}} are needed')
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
        if kind == "video" and (given := self.clip_settings(record)):
            if len(values) == 1 and not found:
                values, value = [self.with_settings(values[0], given)], None
            else:
                where = 'it belongs into the clip that is meant: {"path": …, "' + next(iter(given)) + '": …}'
                self.wrong(next(iter(given)), f"a setting beside {max(len(values), len(found))} clips", where)
        if found and values:
            self.wrong(name, f"stands beside {kind} items in the turns", "keep one of the two")
            return found
        for i, item in enumerate(values):
            field = f"{name}[{i}]" if value is values else name
            found.append(self.clip(item, field) if kind == "video" else self.media_path(item, field, "picture"))
        if len(found) != counted:
            counts = f"{len(found)} {kind}(s) and {counted} {mark} in the turns"
            self.wrong(name, counts, f"one {mark} is needed for each")
        return found

    def clip_settings(self, record: dict) -> dict[str, Any]:
        """Settings of a clip that stand beside it in the record."""
        return {key: record[key] for key in _CLIP_SETTINGS if record.get(key) is not None}

    def with_settings(self, clip: Any, given: dict[str, Any]) -> Any:
        """A clip with the settings that stand beside it."""
        if not isinstance(clip, dict):
            clip = {"frames" if isinstance(clip, list) else "path": clip}
        for key in given:
            if key in clip:
                self.wrong(key, "stands in the clip too", "keep one of the two")
            self.notes.append(f"{key} beside the clip is taken as its setting")
        return {**given, **clip}

    def turns_of(self, record: dict) -> dict:
        """A record whose question and answer stand in fields of their own, as ms-swift and alpaca have them, as turns."""
        if any(record.get(name) is not None for name in self.keys.messages):
            return record
        found = [each for each in _PAIRS if isinstance(record.get(each[0]), str) and record.get(each[2]) is not None]
        if not found:
            return record
        asked, more, answer = found[0]
        question = "\n".join(filter(None, [record[asked], record.get(more) if more else None]))
        history = record.get("history") or []
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            self.wrong("history", quote(history), "pairs [question, answer] are needed")
            history = []
        turns = [
            {self.keys.role[0]: role, self.keys.content[0]: text}
            for pair in [*history, [question, record[answer]]]
            for role, text in zip(self.speakers(), pair, strict=True)
        ]
        self.notes.append(f"{asked} and {answer} are taken as question and answer")
        rest = {key: value for key, value in record.items() if key not in (asked, more, answer, "history")}
        return {**rest, self.keys.messages[0]: turns}

    def speakers(self) -> tuple[str, str]:
        """What a person and the model are called in turns."""
        names = {role: name for name, role in reversed(self.keys.roles)}
        return names[USER], names[ASSISTANT]

    def parse(self, record: Any) -> Conversation:
        if not isinstance(record, dict):
            self.wrong("record", quote(record), "a JSON object is needed")
            return Conversation([])
        images: list = []
        videos: list = []
        record = self.turns_of(record)
        known = (*self.keys.messages, *self.keys.videos, *self.keys.images, *self.keys.system, *self.keys.tools)
        if not any(name in record for name in self.keys.messages) and (inside := _records_inside(record, known)):
            self.wrong(
                inside,
                "holds records",
                "a file holds an array of records, or one record on each line, and nothing around them",
            )
            return Conversation([])
        for key in record:
            if key not in (*known, "system_prompt", *_CLIP_SETTINGS) and (meant := slip_of(key, known)):
                self.wrong(key, "unknown field", f"is {meant} meant?")
        for name, meaning in _ELSEWHERE.items():
            if record.get(name) not in (None, "", [], {}) and not any(record.get(key) for key in self.keys.messages):
                self.wrong(name, "unknown field", meaning)
        self.unread(record, (*known, "system_prompt", *_CLIP_SETTINGS))
        messages = self.turns(record, images, videos)
        shown = "".join(text for role, text in messages if role in (USER, TOOL))
        clips = next((record[key] for key in self.keys.videos if record.get(key)), [])
        clips = len(clips) if isinstance(clips, list) else 1
        pictures = any(record.get(key) for key in self.keys.images) or images or videos
        if clips and not pictures and VIDEO_PLACEHOLDER not in shown and shown.count(IMAGE_PLACEHOLDER) == clips:
            # As LLaVA has it, and what is trained on its records.
            messages = [
                (role, text.replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER) if role in (USER, TOOL) else text)
                for role, text in messages
            ]
            shown = shown.replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)
            self.notes.append("<image> is taken as <video>, since the record has clips and no pictures")
        if messages:
            videos = self.media(record, self.keys.videos, "video", videos, shown.count(VIDEO_PLACEHOLDER))
            images = self.media(record, self.keys.images, "image", images, shown.count(IMAGE_PLACEHOLDER))
        for role, text in messages:
            if "<bbox>" in text or "<ref-object>" in text:
                self.wrong(
                    "objects" if "objects" in record else self.keys.messages[0],
                    f"<bbox> or <ref-object> in a {role} turn",
                    "ms-swift fills it in from `objects`; write coordinates and names into the text",
                )
        if messages and all(
            i in self.unlearnt for i, (role, _) in enumerate(messages) if role in (ASSISTANT, FUNCTION)
        ):
            self.wrong(
                self.keys.messages[0], "no answer is trained on", "at least one without `loss: false` is needed"
            )
        name, system = self.pick(record, (*self.keys.system, "system_prompt"))
        if name == "system_prompt":
            self.notes.append("system_prompt is taken as system")
        if messages and messages[0][0] == SYSTEM:
            if system:
                self.wrong(self.keys.system[0], "stands beside a system turn", "keep one of the two")
            system, messages = messages[0][1], messages[1:]
            self.unlearnt = [number - 1 for number in self.unlearnt]
        if system is not None and not isinstance(system, str):
            self.wrong(self.keys.system[0], quote(system), "a text is needed")
            system = None
        self.check_layout(self.keys.system[0], system or "")
        _, tools = self.pick(record, self.keys.tools)
        listed, problems = read_json(tools) if isinstance(tools, str) and tools else (tools or [], [])
        if problems or not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
            self.wrong(self.keys.tools[0], quote(tools), "a list of tools, or its JSON text, is needed")
        tools = json_text(listed) if listed else ""
        self.check_layout(self.keys.tools[0], tools)
        unlearnt = tuple(self.unlearnt)
        return Conversation(messages, images, videos, system or "", tools, unlearnt, notes=self.notes)


def parse_record(
    record: Any,
    find: Callable[[str], str | None],
    keys: RecordKeys = RecordKeys(),  # noqa: B008 - frozen
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
