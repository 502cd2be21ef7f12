"""LLaMA-Factory's chat, in the terminal, in LLaMA-Board and from Python, answered by `VideoModel`."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ..media import ASSISTANT, IMAGE_PLACEHOLDER, USER, VIDEO_PLACEHOLDER, Conversation, strip_around_placeholders
from ..model.decoding import Decoding
from ..model.video_model import VideoModel
from ..records.question import TO_COME
from ..records.schema import given_schema
from ..video.reader import as_clip
from .core import is_ours, replace_everywhere
from .items import make_encoder
from .keys import listed
from .prompt import check_placeholders

SOURCE = "the question"  # what errors name


def schema_of(model_args: Any) -> dict[str, Any] | None:
    """The JSON Schema that a recipe holds answers to.

    Raises:
        ValueError: if its keys contradict each other, or name no schema.
    """
    names = ("json_schema", "json_schema_from", "json_schema_vocabulary")
    file, data = (
        None if path is None else Path(path) for path in (model_args.json_schema, model_args.json_schema_from)
    )
    return given_schema(file, data, listed(model_args.json_schema_vocabulary), names)


def decoding_of(generating_args: dict[str, Any], schema: dict[str, Any] | None = None) -> Decoding:
    """How a recipe's answers are written.

    Raises:
        ValueError: if it asks for what is not supported.
    """
    if generating_args.get("num_beams", 1) != 1:
        raise ValueError(
            f"num_beams is {generating_args['num_beams']}; answers are written one token after another: 1"
        )
    draws = generating_args.get("do_sample", True)
    return Decoding(
        max_new_tokens=generating_args.get("max_new_tokens") or 1024,
        temperature=generating_args.get("temperature", 0.95) if draws else 0.0,
        top_p=generating_args.get("top_p", 0.7),
        top_k=generating_args.get("top_k", 50),
        repetition_penalty=generating_args.get("repetition_penalty", 1.0),
        schema=schema,
    )


def _conversation(
    messages: Sequence[dict[str, str]],
    system: str | None,
    tools: str | None,
    images: Sequence[Any] | None,
    videos: Sequence[Any] | None,
) -> Conversation:
    """What LLaMA-Factory passes on of a chat, as a question."""
    turns = [dict(message) for message in messages]
    for mark, given in ((IMAGE_PLACEHOLDER, images), (VIDEO_PLACEHOLDER, videos)):
        if given and not any(mark in turn["content"] for turn in turns):
            turns[0]["content"] = mark * len(given) + turns[0]["content"]
    texts = [
        (turn["role"], strip_around_placeholders(turn["content"]) if turn["role"] == USER else turn["content"])
        for turn in turns
    ]
    check_placeholders(texts, images or (), videos or ())
    return Conversation(
        [*texts, (ASSISTANT, TO_COME)],
        images=list(images or ()),
        videos=[as_clip(video) for video in videos or ()],
        system=system or "",
        tools=tools or "",
        source=SOURCE,
    )


def extend_engine(hf_engine: ModuleType) -> None:
    """Where the template is ours, answers are `VideoModel`'s."""
    stock, response = hf_engine.HuggingfaceEngine, hf_engine.Response

    class HuggingfaceEngine(stock):
        video_model: VideoModel | None = None

        def __init__(self, model_args: Any, data_args: Any, finetuning_args: Any, generating_args: Any) -> None:
            ours = is_ours(model_args)
            defaults = decoding_of(generating_args.to_dict(), schema_of(model_args)) if ours else None
            super().__init__(model_args, data_args, finetuning_args, generating_args)
            if not ours or not self.can_generate:
                return
            asked = make_encoder(self.template, self.tokenizer, self.processor, data_args, generation=True)
            room = self.model.config.text_config.max_position_embeddings
            encoder = replace(asked, cutoff_len=room, shrink=False)
            self.video_model, self.decoding, self.model_args = VideoModel(self.model, encoder), defaults, model_args
            if defaults.schema is not None:
                self.video_model.hold([], defaults)

        def _decoding(self, given: dict[str, Any]) -> tuple[Decoding, int]:
            """How an answer is written, and how many are."""
            names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
            changed = {name: given[name] for name in names if given.get(name) is not None}
            if given.get("do_sample") is False:
                changed["temperature"] = 0.0
            stop = given.get("stop")
            if stop:
                changed["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
            return replace(self.decoding, **changed), given.get("num_return_sequences") or 1

        async def chat(self, messages, system=None, tools=None, images=None, videos=None, audios=None, **given):
            if self.video_model is None:
                return await super().chat(messages, system, tools, images, videos, audios, **given)
            decoding, count = self._decoding(given)
            conversation = _conversation(messages, system, tools, images, videos)

            def ask() -> list[Any]:
                loaded = self.video_model.encoder.load(conversation)
                return self.video_model.answer([loaded] * count, decoding)

            answers = await asyncio.to_thread(ask)
            return [
                response(
                    response_text=answer.text,
                    response_length=answer.tokens,
                    prompt_length=answer.prompt_tokens,
                    finish_reason="stop" if answer.is_whole else "length",
                )
                for answer in answers
            ]

        async def stream_chat(
            self, messages, system=None, tools=None, images=None, videos=None, audios=None, **given
        ) -> AsyncGenerator[str, None]:
            if self.video_model is None:
                async for piece in super().stream_chat(messages, system, tools, images, videos, audios, **given):
                    yield piece
                return
            pieces = self.video_model.stream(
                _conversation(messages, system, tools, images, videos), self._decoding(given)[0]
            )
            try:
                while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                    yield piece
            finally:
                pieces.close()

    replace_everywhere(hf_engine, "HuggingfaceEngine", HuggingfaceEngine)
