"""A chat completion request in OpenAI's form -> a question and how it is answered. What is not known is refused, not ignored."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..media import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Clip, Conversation
from ..model.decoding import Decoding
from ..records.question import parse_question
from ..records.schema import check_schema
from ..words import meant
from .media import RequestError

_MOST_ANSWERS = 16
_CLIP_SETTINGS = tuple(f.name for f in fields(Clip) if f.name not in ("path", "frames", "frame_rate", "times"))
# Settings of all clips of a request, under a recipe's names.
_ALL_CLIPS = {"video_fps": "fps"} | {
    f"video_{name}": name for name in ("min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")
}
_NUMBERS = {  # name -> type, least, greatest
    "temperature": (float, 0, 100),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, 1 << 30),
    "repetition_penalty": (float, 0, 100),
    "seed": (int, -(1 << 63), (1 << 63) - 1),
    "n": (int, 1, _MOST_ANSWERS),
    "max_tokens": (int, 1, 1 << 30),
    "max_completion_tokens": (int, 1, 1 << 30),
    "max_new_tokens": (int, 1, 1 << 30),
}
# Known to OpenAI's API, and without any meaning for an answer.
_HARMLESS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
)
# Known there, and not to be had here, unless they say nothing.
_UNSUPPORTED = (
    *("frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "audio", "modalities"),
    *("prediction", "reasoning_effort", "verbosity", "web_search_options", "functions", "function_call"),
)
_KNOWN = (
    *("model", "messages", "stream", "stream_options", "stop", "response_format", "tools", "tool_choice", "do_sample"),
    *_NUMBERS,
    *_ALL_CLIPS,
)


@dataclass(frozen=True)
class Request:
    """What is asked, and how it is answered.

    Attributes:
        answers: how many, drawn each for itself.
        has_tools: whether the answer may be a call of one.
        with_usage: whether a stream ends with the count of tokens.
    """

    conversation: Conversation
    decoding: Decoding
    model: str
    answers: int = 1
    stream: bool = False
    with_usage: bool = False
    has_tools: bool = False


def read_request(body: Any, defaults: Decoding, open_media: Callable[[Any, str], Any]) -> Request:
    """Read a request.

    Args:
        body: its JSON.
        defaults: how answers are written where it does not say.
        open_media: takes what a clip or picture is named by, and where; gives a path or a file object.

    Raises:
        RequestError: naming the part of it that is wrong.
    """
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    for name, value in body.items():
        if name in _UNSUPPORTED and value not in (None, 0, False, {}, [], "none", ["text"]):
            raise RequestError(f"{name} is not supported by this server", param=name)
        if name not in (*_KNOWN, *_HARMLESS, *_UNSUPPORTED):
            raise RequestError(f"unknown parameter {name}{meant(name, _KNOWN)}", param=name)
    model = body.get("model", "")
    if not isinstance(model, str):
        raise RequestError("model must be a text", param="model")
    decoding = _decoding(body, defaults)
    count = _number(body, "n") or 1
    stream = _flag(body, "stream")
    if count > 1 and not decoding.temperature:
        raise RequestError(f"n is {count}, but without a temperature all answers are the same; give one", param="n")
    if count > 1 and stream:
        raise RequestError(f"n is {count}; answers are streamed one at a time", param="n")
    streaming = body.get("stream_options") or {}
    if not isinstance(streaming, dict) or streaming.keys() - {"include_usage", "include_obfuscation"}:
        raise RequestError("stream_options may have include_usage", param="stream_options")
    tools = body.get("tools") or []
    if body.get("tool_choice") not in (None, "auto", "none"):
        raise RequestError("tool_choice may be auto or none", param="tool_choice")
    tools = [] if body.get("tool_choice") == "none" else tools
    conversation = _conversation(body, tools, open_media)
    return Request(
        conversation, decoding, model, count, stream, bool(streaming.get("include_usage")), has_tools=bool(tools)
    )


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise RequestError(f"{name} must be true or false; found {json.dumps(value)[:80]}", param=name)
    return bool(value)


def _number(body: dict[str, Any], name: str) -> Any:
    value = body.get(name)
    if value is None:
        return None
    kind, least, most = _NUMBERS[name]
    right = isinstance(value, int | float) and not isinstance(value, bool)
    right = right and (kind is float or float(value).is_integer())
    if not right or not least <= value <= most:
        wanted = "a whole number" if kind is int else "a number"
        raise RequestError(
            f"{name} must be {wanted} from {least} to {most}; found {json.dumps(value)[:80]}", param=name
        )
    return kind(value)


def _decoding(body: dict[str, Any], defaults: Decoding) -> Decoding:
    given = {name: value for name in _NUMBERS if (value := _number(body, name)) is not None}
    lengths = {
        name: given.pop(name) for name in ("max_completion_tokens", "max_tokens", "max_new_tokens") if name in given
    }
    if len(set(lengths.values())) > 1:
        raise RequestError(
            f"{' and '.join(lengths)} contradict each other; give one of them", param=next(iter(lengths))
        )
    if lengths:
        given["max_new_tokens"] = next(iter(lengths.values()))
    given.pop("n", None)
    if body.get("do_sample") is not None and not _flag(body, "do_sample"):
        given["temperature"] = 0.0
    elif _flag(body, "do_sample") and not given.get("temperature", defaults.temperature):
        given["temperature"] = 1.0
    stop = body.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(each, str) and each for each in stop):
        raise RequestError("stop must be a text or a list of texts", param="stop")
    if stop:
        given["stop"] = tuple(stop)
    if "response_format" in body:
        given["schema"] = _schema(body["response_format"])
    try:
        return replace(defaults, **given)
    except ValueError as error:
        raise RequestError(str(error), param=str(error).partition(" ")[0]) from None


def _schema(form: Any) -> dict[str, Any] | None:
    kind = form.get("type") if isinstance(form, dict) else None
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        held = form.get("json_schema")
        try:
            return check_schema(
                held.get("schema") if isinstance(held, dict) else None, "response_format.json_schema.schema"
            )
        except ValueError as error:
            raise RequestError(str(error), param="response_format") from None
    raise RequestError(
        f"response_format.type must be text, json_object or json_schema; found {json.dumps(form)[:80]}",
        param="response_format",
    )


# --- Messages ---------------------------------------------------------------------------------------------------------


def _conversation(body: dict[str, Any], tools: list[Any], open_media: Callable[[Any, str], Any]) -> Conversation:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one message", param="messages")
    of_all = {}
    for name, setting in _ALL_CLIPS.items():
        if body.get(name) is not None:
            of_all[setting] = body[name]
    clips: list[tuple[str, dict[str, Any]]] = []
    pictures: list[str] = []
    sources: dict[str, Any] = {}
    turns, system = [], ""
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise RequestError(f"{where} must be an object with role and content", param=where)
        text = _text(message.get("content"), f"{where}.content", clips, pictures, sources, open_media)
        if message.get("role") in ("system", "developer"):
            if number:
                raise RequestError(f"{where}: a system message must be the first", param=where)
            system = text
            continue
        turn = {"role": message.get("role"), "content": text}
        if message.get("tool_calls"):
            turn["tool_calls"] = message["tool_calls"]
        turns.append(turn)
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise RequestError("the last message must be the user's, which is answered", param="messages")
    # Clips and pictures stand under names while the rest is checked as records are.
    named = [{"path": name, **of_all, **settings} for name, settings in clips]
    conversation, problems = parse_question(turns, named, pictures, system, tools, lambda name: name)
    if problems:
        raise RequestError("; ".join(map(str, problems)), param="messages")
    return replace(
        conversation,
        videos=[replace(clip, path=sources[clip.path]) for clip in conversation.videos],
        images=[sources[name] for name in conversation.images],
        source="the request",
    )


def _text(
    content: Any,
    where: str,
    clips: list[tuple[str, dict[str, Any]]],
    pictures: list[str],
    sources: dict[str, Any],
    open_media: Callable[[Any, str], Any],
) -> str:
    """A message's text, with placeholders where clips and pictures are shown; these go into the lists."""
    if content is None:
        return ""
    if isinstance(content, str):
        _no_placeholder(content, where)
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a text or a list of items", param=where)
    text = ""
    for number, item in enumerate(content):
        at = f"{where}[{number}]"
        kind = item.get("type") if isinstance(item, dict) else None
        if kind in ("text", "input_text"):
            if not isinstance(item.get("text"), str):
                raise RequestError(f"{at}.text must be a text", param=at)
            _no_placeholder(item["text"], at)
            text += item["text"]
        elif kind in ("video_url", "video", "input_video"):
            url, settings = _named(item, at, ("video_url", "video"), _CLIP_SETTINGS)
            name = f"clip {len(clips) + 1}"
            clips.append((name, settings))
            sources[name] = open_media(url, at)
            text += VIDEO_PLACEHOLDER
        elif kind in ("image_url", "image", "input_image"):
            url, _ = _named(item, at, ("image_url", "image"), ("detail",))
            name = f"picture {len(pictures) + 1}"
            pictures.append(name)
            sources[name] = open_media(url, at)
            text += IMAGE_PLACEHOLDER
        else:
            raise RequestError(f"{at}.type must be text, video_url or image_url; found {kind}", param=at)
    return text


def _no_placeholder(text: str, where: str) -> None:
    for mark in (VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER):
        if mark in text:
            raise RequestError(f"{where} holds {mark}; give clips and pictures as items of the content", param=where)


def _named(
    item: dict[str, Any], where: str, names: Sequence[str], settings: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    """What an item names, and its settings, which may stand beside the name or beside the url in it."""
    given = [name for name in names if name in item]
    if len(given) != 1:
        raise RequestError(f"{where} must have one of {', '.join(names)}", param=where)
    held = item[given[0]]
    inner = dict(held) if isinstance(held, dict) else {"url": held}
    if isinstance(held, list):
        raise RequestError(f"{where}: lists of frames are not read; send the clip", param=where)
    found = {}
    for part in (inner, {key: value for key, value in item.items() if key not in ("type", *names)}):
        for key, value in part.items():
            if key == "url":
                continue
            if key not in settings:
                raise RequestError(f"{where}: unknown setting {key}; known are {', '.join(settings)}", param=where)
            found[key] = value
    return inner.get("url"), found
