"""Clips named in lines typed into `llamafactory-cli chat`."""

import os
import re
from types import ModuleType
from typing import Any

from ..media import USER
from ..model.decoding import OutOfMemory
from .core import is_ours, replace_everywhere
from .engine import SOURCE


def take_inline_media(messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[str], list[str]]:
    """`<video>path</video>` and `<image>path</image>` in user messages -> placeholders, and the paths in order.

    Returns:
        The messages, paths of videos, paths of images.

    Raises:
        ValueError: if a tag is not closed.
    """
    paths: dict[str, list[str]] = {"video": [], "image": []}

    def place(match: re.Match) -> str:
        path = match[2].strip()
        quoted = len(path) > 1 and path[0] == path[-1] and path[0] in "\"'"
        path = (path[1:-1] if quoted else path).removeprefix("file://")
        paths[match[1]].append(os.path.expanduser(path))
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


def extend_chat(chat_model: ModuleType) -> None:
    """`<video>path</video>` in lines typed into `llamafactory-cli chat`; in no server, where it would read files."""
    run, stock = chat_model.run_chat, chat_model.ChatModel

    class VideoChatModel(stock):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.shows_clips = is_ours(self.engine.template)
            if self.shows_clips:
                print(
                    "Show a clip with <video>path/to/clip.mp4</video> in your message, a picture with <image>…</image>."
                )

        def stream_chat(self, messages: list[dict[str, str]], *args: Any, **kwargs: Any) -> Any:
            if not self.shows_clips:
                yield from super().stream_chat(messages, *args, **kwargs)
                return

            # A question that failed is not asked again with the next one.
            for i in reversed([i for i, m in enumerate(messages) if m["content"].startswith("[error: ")]):
                del messages[i - 1 : i + 1]
            try:
                asked, videos, images = take_inline_media(messages)
                yield from super().stream_chat(asked, *args, videos=videos or None, images=images or None, **kwargs)
            except (ValueError, OutOfMemory) as error:
                yield f"[error: {str(error).removeprefix(f'{SOURCE}: ')}]"

    def run_chat() -> None:
        chat_model.ChatModel = VideoChatModel
        try:
            run()
        finally:
            chat_model.ChatModel = stock

    replace_everywhere(chat_model, "run_chat", run_chat)
