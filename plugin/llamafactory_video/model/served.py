"""A model behind an OpenAI-compatible address, asked as `VideoModel` is: by this project's API, vLLM, SGLang or a provider.

Clips are sent whole, with their settings beside them, and how they are sampled is the server's affair; or their frames are
sent, sampled here, with their times, as vLLM takes them.
"""

import base64
import io
import mimetypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import requests
from PIL import Image

from ..media import (
    ASSISTANT,
    FUNCTION,
    TOOL,
    USER,
    Clip,
    Conversation,
    is_address,
    laid_out,
)
from ..prompt.encoder import Encoder
from .decoding import GREEDY, Decoding
from .servers import TICKS, ticks_of

_ROLES = {USER: "user", ASSISTANT: "assistant", TOOL: "tool", FUNCTION: "assistant"}
_WAITS = (1, 4, 16)  # seconds before a question that failed for the server's sake is asked again
_AT_ONCE = 16  # with 4, vLLM answers half as many a second (benchmarks/infer_against_vllm.py)


class ServedModel:
    """What a server answers.

    Args:
        address: such as http://127.0.0.1:8000/v1, with #NAME behind it where the server has several models.
        timeout: seconds that one answer may take.
        key: that the server asks for; None: the variable OPENAI_API_KEY.
        encoder: what samples clips here, as the model was trained, so that frames are sent; None: clips are sent whole.
    """

    def __init__(
        self, address: str, timeout: float = 600.0, key: str | None = None, encoder: Encoder | None = None
    ) -> None:
        self.address, _, self.name = address.partition("#")
        self.timeout, self.key = timeout, key or os.environ.get("OPENAI_API_KEY", "none")
        self._session, self._encoder = requests.Session(), encoder
        if not self.name:
            self.name = self._only_model()

    def ask_many(
        self,
        questions: Sequence[Conversation],
        decoding: Decoding = GREEDY,
        batch_size: int | None = None,
        say: Callable[[str], None] = print,
    ) -> Iterator[tuple[int, str | Exception]]:
        """Answers with the numbers of their questions, as they are done; errors in place of those that have none.

        Args:
            batch_size: questions at once; None: 16.
        """
        with ThreadPoolExecutor(batch_size or _AT_ONCE) as pool:
            work = {pool.submit(self._ask, each, decoding): number for number, each in enumerate(questions)}
            try:
                for done in as_completed(work):
                    error = done.exception()
                    if error is not None and not isinstance(error, ValueError | OSError):
                        raise error
                    yield work[done], done.result() if error is None else error
            finally:
                for left in work:
                    left.cancel()

    def _ask(self, question: Conversation, decoding: Decoding) -> str:
        body = {
            "model": self.name,
            **asked_of_server(question, self._encoder),
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "max_tokens": decoding.max_new_tokens,
        }
        if question.tools:
            raise ValueError("questions with tools are not asked of servers")
        # OpenAI's own API has no such settings, and refuses those that it does not know.
        if decoding.top_k:
            body["top_k"] = decoding.top_k
        if decoding.repetition_penalty != 1:
            body["repetition_penalty"] = decoding.repetition_penalty
        if decoding.seed is not None:
            body["seed"] = decoding.seed
        if decoding.schema is not None:
            schema = {"name": "answer", "schema": decoding.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        answer = self._call("post", "/chat/completions", body)
        try:
            return answer["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self.address}: no answer in what came: {str(answer)[:200]}") from error

    def _only_model(self) -> str:
        models = [model.get("id", "") for model in self._call("get", "/models").get("data", [])]
        if len(models) != 1:
            raise ValueError(f"{self.address} has {', '.join(models) or 'no models'}; name one: {self.address}#NAME")
        return models[0]

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        for wait in (*_WAITS, None):
            try:
                answer = self._session.request(
                    method,
                    self.address.rstrip("/") + path,
                    json=body,
                    headers={"Authorization": f"Bearer {self.key}"},
                    timeout=(10, self.timeout),
                )
            except requests.RequestException as error:
                if wait is None:
                    raise ValueError(f"{self.address} does not answer: {error}") from error
            else:
                if answer.ok:
                    return answer.json()
                if wait is None or (answer.status_code < 500 and answer.status_code != 429):
                    raise ValueError(f"{self.address} answers with status {answer.status_code}: {_reason(answer)}")
            time.sleep(wait)
        raise AssertionError("the last try has returned or raised")


def _reason(answer: requests.Response) -> str:
    try:
        error = answer.json()["error"]
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]


def asked_of_server(question: Conversation, encoder: Encoder | None = None) -> dict[str, Any]:
    """What of a request's body tells the question: its messages, and how its frames are to be taken.

    Args:
        encoder: what samples its clips; None: they are sent whole.

    Raises:
        ValueError: if a server cannot be asked it.
    """
    if encoder is None or not question.videos:
        return {"messages": messages_of(question)}
    if len(question.videos) > 1:
        raise ValueError(f"{len(question.videos)} clips in one question: vLLM takes the frames and times of one")
    _, (clip,) = encoder.load(question)
    times, size = list(clip.plan.times), len(clip.plan.times) // clip.plan.grid[0]
    ticks = ticks_of(times, size)
    told = {"num_frames": -1, "fps": TICKS, "frames_indices": ticks, "total_num_frames": ticks[-1] + 1}
    told |= {"duration": times[-1], "do_sample_frames": False}
    return {
        "messages": messages_of(question, _frames_url(clip.frames)),
        "media_io_kwargs": {"video": told},
        "mm_processor_kwargs": {"videos_kwargs": {"do_resize": False, "do_sample_frames": False}},
    }


def messages_of(question: Conversation, frames: str | None = None) -> list[dict[str, Any]]:
    """A question's turns as OpenAI's API has them, but for the answer that is to come; clips and pictures inside them.

    Args:
        frames: a data URL of the frames of its one clip, in place of the clip.
    """
    clips, images = iter(question.videos), iter(question.images)
    messages: list[dict[str, Any]] = [{"role": "system", "content": question.system}] if question.system else []
    for role, text in question.messages[:-1]:
        if role not in (USER, TOOL):
            messages.append({"role": _ROLES[role], "content": text})
            continue
        items = [_item(kind, shown, frames) for kind, shown in laid_out(text, clips, images)]
        messages.append({"role": _ROLES[role], "content": items})
    return messages


def _item(kind: str, shown: Any, frames: str | None) -> dict[str, Any]:
    if kind == "text":
        return {"type": "text", "text": shown}
    if kind == "image":
        return {"type": "image_url", "image_url": {"url": _data_url(shown)}}
    return _clip_item(shown) if frames is None else {"type": "video_url", "video_url": {"url": frames}}


def _clip_item(clip: Clip) -> dict[str, Any]:
    if clip.frames:
        raise ValueError(f"{clip}: lists of frames are not asked of servers; make a video file of them")
    settings = {name: value for name, value in clip.settings.items() if value is not None}
    ends = {name: getattr(clip, name) for name in ("start", "end") if getattr(clip, name) is not None}
    return {"type": "video_url", "video_url": {"url": _data_url(clip.path)}, **settings, **ends}


def _frames_url(frames: np.ndarray) -> str:
    """Frames, (T, H, W, 3), as vLLM takes a clip of single pictures; these are PNG, whatever the name says, and lose nothing."""
    parts = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "PNG", compress_level=1)
        parts.append(base64.b64encode(buffer.getvalue()).decode())
    return f"data:video/jpeg;base64,{','.join(parts)}"


def _data_url(media: Any) -> str:
    """A file, or an opened picture, as a data URL; an address as it is."""
    if is_address(media):
        return media
    if not isinstance(media, str):
        buffer = io.BytesIO()
        media.save(buffer, "PNG")
        kind, data = "image/png", buffer.getvalue()
    else:
        kind, data = mimetypes.guess_type(media)[0] or "video/mp4", Path(media).read_bytes()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
