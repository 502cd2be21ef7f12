"""OpenAI's chat completions over HTTP. Every question is answered, or refused with a reason in OpenAI's form."""

import asyncio
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from ..model.decoding import Answer, Decoding, OutOfMemory
from ..model.video_model import VideoModel
from ..prompt.encoder import Sample
from ..records.report import DatasetError
from .media import MediaAccess, RequestError
from .request import Request as Asked
from .request import read_request

logger = logging.getLogger("uvicorn.error")  # whose lines are shown beside those of the server
_LOOK = 0.2  # seconds between looks at whether a client is still there
_DRAINED = 4  # times the limit that is read of an upload which is refused, so that its sender hears why
_MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What a server takes.

    Attributes:
        name: of the model, as clients see it.
        is_strict: whether they must give that name.
        key: that they must send; None: none.
        most_upload: bytes of a request.
        most_visual_tokens: of a request; None: as many as the model takes.
        defaults: how answers are written where a request does not say.
        media: which clips and pictures may be named.
        root_path: where a proxy shows the server.
    """

    name: str
    is_strict: bool = False
    key: str | None = None
    most_upload: int = 256 * _MIB
    most_visual_tokens: int | None = None
    defaults: Decoding = field(default_factory=Decoding)
    media: MediaAccess = field(default_factory=MediaAccess)
    root_path: str = ""


def create_app(model: VideoModel, settings: Settings) -> FastAPI:
    """The server."""
    service = _Service(model, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="llamafactory-video", lifespan=lifespan, root_path=settings.root_path)
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
    )
    app.add_exception_handler(RequestError, lambda _, error: _refusal(str(error), error.status, error.param))
    app.add_exception_handler(Exception, lambda *_: _refusal("the server failed; its log says why", 500))
    app.add_exception_handler(HTTPException, lambda _, error: _refusal(str(error.detail), error.status_code))
    app.add_exception_handler(404, lambda request, _: _refusal(f"there is nothing at {request.url.path}", 404))
    app.add_exception_handler(405, lambda request, _: _refusal(f"{request.method} is not for {request.url.path}", 405))

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        service.check_key(request)
        card = {"id": settings.name, "object": "model", "created": int(service.started), "owned_by": "owner"}
        return {"object": "list", "data": [card]}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        service.check_key(request)
        return await service.complete(request)

    return app


def _refusal(message: str, status: int, param: str | None = None) -> JSONResponse:
    return JSONResponse(_error(message, status, param), status_code=status)


def _error(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    kinds = {401: "authentication_error", 403: "permission_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


class _Service:
    """Questions are read side by side, and answered one after another, in the order in which they were read."""

    def __init__(self, model: VideoModel, settings: Settings) -> None:
        self.model, self.settings, self.started = model, settings, time.time()
        self._readers = ThreadPoolExecutor(4, "read request")
        self._writer = ThreadPoolExecutor(1, "write answer")

    def close(self) -> None:
        for pool in (self._readers, self._writer):
            pool.shutdown(wait=False, cancel_futures=True)

    def check_key(self, request: Request) -> None:
        key = self.settings.key
        if key and request.headers.get("authorization") != f"Bearer {key}":
            raise RequestError("the API key is missing or wrong; send it as `Authorization: Bearer …`", 401)

    async def complete(self, request: Request) -> Response:
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        try:
            body = await self._body(request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        size = len(body)
        read = loop.run_in_executor(self._readers, self._read, body)
        del body  # of an upload there is one copy less while its clip is read
        asked, loaded = await read
        logger.info(
            "%s: %.1f MiB, %d tokens, read in %.2f s",
            request.client.host if request.client else "a client",
            size / _MIB,
            len(loaded[0].ids),
            time.monotonic() - began,
        )
        stopped = threading.Event()
        if asked.stream:
            pieces: asyncio.Queue = asyncio.Queue()

            def say(piece: Any) -> None:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

            written = loop.run_in_executor(self._writer, self._write, asked, loaded, stopped, say)
            written.add_done_callback(lambda _: pieces.put_nowait(None))
            return StreamingResponse(self._stream(asked, pieces, written, stopped), media_type="text/event-stream")
        written = loop.run_in_executor(self._writer, self._write, asked, loaded, stopped, None)
        try:
            while not (await asyncio.wait([written], timeout=_LOOK))[0]:
                if await request.is_disconnected():
                    return Response(status_code=499)  # nobody reads it
            return JSONResponse(_completion(asked, await written, self.settings.name))
        finally:
            stopped.set()

    async def _body(self, request: Request) -> bytes:
        """The body of a request, no larger than it may be."""
        most = self.settings.most_upload
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size <= most:
                parts.append(part)
            elif size > most * _DRAINED:
                break
            else:
                parts.clear()
        if size > most:
            raise RequestError(
                f"the request has more than api_max_upload_mb, {most / _MIB:g} MiB; send a shorter clip, or its address",
                413,
            )
        return b"".join(parts)

    def _read(self, body: bytes) -> tuple[Asked, Any]:
        """A question and its frames."""
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON: {error}") from None
        del body
        settings = self.settings
        try:
            asked = read_request(value, settings.defaults, settings.media.open)
            del value
            if settings.is_strict and asked.model != settings.name:
                raise RequestError(f"there is no model {asked.model}; this server has {settings.name}", 404, "model")
            self.model.hold([], asked.decoding)  # tells whether answers can be held to a schema
            sample = self.model.encoder.encode(asked.conversation)
            self._check_size(sample, asked)
            return asked, self.model.encoder.load(asked.conversation, sample)
        except DatasetError as error:
            if any(error.lengths):
                raise self._too_long(*error.lengths) from error
            raise RequestError(str(error), param="messages") from error
        except RequestError:
            raise
        except (ValueError, OSError) as error:
            raise RequestError(str(error)) from error

    def _check_size(self, sample: Sample, asked: Asked) -> None:
        most, visual = self.settings.most_visual_tokens, self.model.encoder.visual_tokens(sample.ids)
        if most is not None and visual > most:
            raise RequestError(
                f"{visual} visual tokens are more than api_max_visual_tokens, {most}; ask with less fps, max_frames or "
                "max_pixels, or about a part of the clip",
                413,
                "messages",
            )
        if len(sample.ids) + asked.decoding.max_new_tokens > self.model.encoder.cutoff_len:
            raise self._too_long(len(sample.ids), visual, asked.decoding.max_new_tokens)

    def _too_long(self, tokens: int, visual: int, answer: int = 0) -> RequestError:
        room = f" and {answer} of the answer" if answer else ""
        return RequestError(
            f"{tokens} tokens, {visual} of them visual,{room} are more than the model takes, "
            f"{self.model.encoder.cutoff_len}; ask with less fps, max_frames or max_pixels",
            413,
            "messages",
        )

    def _write(
        self, asked: Asked, loaded: Any, stopped: threading.Event, say: Callable[[str], None] | None
    ) -> list[Answer]:
        if stopped.is_set():
            return []
        try:
            return self.model.answer([loaded] * asked.answers, asked.decoding, stopped, say)
        except OutOfMemory as error:
            raise RequestError(str(error), 413, "messages") from error
        except ValueError as error:
            raise RequestError(str(error)) from error

    async def _stream(
        self, asked: Asked, pieces: asyncio.Queue, written: asyncio.Future, stopped: threading.Event
    ) -> AsyncIterator[str]:
        """Chunks as OpenAI sends them; what goes wrong on the way is the last of them."""
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion.chunk", "created": int(time.time())}
        head["model"] = asked.model or self.settings.name

        def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
            return _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

        text = ""
        try:
            yield chunk({"role": "assistant", "content": ""})
            while (piece := await pieces.get()) is not None:
                text += piece
                if not asked.has_tools:  # a call of a tool is read when it is whole
                    yield chunk({"content": piece})
            (answer,) = await written
            message, reason = _message(asked, answer)
            if asked.has_tools:
                calls = [{"index": i, **call} for i, call in enumerate(message.get("tool_calls", ()))]
                yield chunk({"tool_calls": calls} if calls else {"content": text})
            yield chunk({}, reason)
            if asked.with_usage:
                yield _event({**head, "choices": [], "usage": _usage([answer])})
            yield "data: [DONE]\n\n"
        except RequestError as error:
            yield _event(_error(str(error), error.status, error.param))
        except Exception:
            logger.exception("an answer broke off")
            yield _event(_error("the server failed; its log says why", 500))
        finally:
            stopped.set()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _completion(asked: Asked, answers: Sequence[Answer], name: str) -> dict[str, Any]:
    choices = []
    for number, answer in enumerate(answers):
        message, reason = _message(asked, answer)
        choices.append({"index": number, "message": message, "finish_reason": reason})
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.model or name,
        "choices": choices,
        "usage": _usage(answers),
    }


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    prompt, completion = answers[0].prompt_tokens, sum(answer.tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _message(asked: Asked, answer: Answer) -> tuple[dict[str, Any], str]:
    """An answer as a message, and why it ended."""
    reason = "stop" if answer.is_whole else "length"
    found = re.findall(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", answer.text, re.DOTALL) if asked.has_tools else []
    calls = []
    for text in found:
        try:
            call = json.loads(text)
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            function = {"name": call["name"], "arguments": arguments}
        except (ValueError, KeyError, TypeError):
            continue
        calls.append({"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function})
    if calls:
        text = re.sub(r"\s*<tool_call>.*</tool_call>\s*", "", answer.text, flags=re.DOTALL)
        return {"role": "assistant", "content": text or None, "tool_calls": calls}, "tool_calls"
    return {"role": "assistant", "content": answer.text}, reason
