"""lmms-eval's messages and settings as ours; without lmms-eval."""

from collections.abc import Sequence
from typing import Any

from ..media import (
    ASSISTANT,
    IMAGE_PLACEHOLDER,
    SYSTEM,
    USER,
    VIDEO_PLACEHOLDER,
    Clip,
    Conversation,
    strip_around_placeholders,
)
from ..model.decoding import Decoding
from ..records.question import TO_COME


def decoding_of(options: dict[str, Any]) -> Decoding:
    """How a task's `generation_kwargs` want answers to be written."""
    drawn = options.get("do_sample", (options.get("temperature") or 0) > 0)
    until = options.get("until") or ()
    return Decoding(
        max_new_tokens=options.get("max_new_tokens") or options.get("max_gen_toks") or 1024,
        temperature=float(options.get("temperature") or 0) if drawn else 0.0,
        top_p=options.get("top_p") or 1.0,
        stop=(until,) if isinstance(until, str) else tuple(until),
    )


def conversation_of(messages: Sequence[dict[str, Any]]) -> Conversation:
    """lmms-eval's messages as a conversation whose last answer is to come.

    Clips have their ends in `start_time` and `end_time`, and in tasks that `lmf-video eval --export-lmms` wrote further settings
    in `settings`.
    """
    turns, videos, images, system = [], [], [], ""
    roles = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
    for message in messages:
        text = ""
        for item in message["content"]:
            if item["type"] == "text":
                text += item["text"]
            elif item["type"] == "video":
                ends = {"start": item.get("start_time"), "end": item.get("end_time")}
                videos.append(Clip(path=item["url"], **ends, **(item.get("settings") or {})))
                text += VIDEO_PLACEHOLDER
            elif item["type"] == "image":
                images.append(item["url"])
                text += IMAGE_PLACEHOLDER
            else:
                raise ValueError(f"Qwen3-VL takes clips, pictures and texts; the task has {item['type']}")
        role = roles[message["role"]]
        if role == SYSTEM:
            system = text
        else:
            turns.append((role, strip_around_placeholders(text) if role == USER else text))
    return Conversation([*turns, (ASSISTANT, TO_COME)], images, videos, system)
