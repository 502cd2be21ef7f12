"""How answers are written: settings, their pieces as they come, and where they end."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import StoppingCriteria
from transformers.generation import BaseStreamer


@dataclass(frozen=True)
class Decoding:
    """How answers are written.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        temperature: 0: the likeliest token each time; above, drawn at random.
        top_p, top_k: from the likeliest tokens alone, by their share and number; 0: all, for `top_k`.
        repetition_penalty: above 1, tokens that were there become less likely.
        seed: of what is drawn; None: another each time.
        schema: a JSON Schema that answers are held to; None: any text.
        stop: texts that end an answer, which they are no part of.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    schema: dict[str, Any] | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, right, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {wanted}")


GREEDY = Decoding()


class OutOfMemory(RuntimeError):
    """The device has no room for a question."""


@dataclass(frozen=True)
class Answer:
    """What was written.

    Attributes:
        text: without what ended it.
        tokens: written, with what ended it.
        prompt_tokens: of the question.
        is_whole: whether it was ended, by the model or by one of `Decoding.stop`, and not by lack of room.
    """

    text: str
    tokens: int
    prompt_tokens: int
    is_whole: bool


class Stopped(StoppingCriteria):
    """Ends an answer that nobody reads any more, or that has come to its end."""

    def __init__(self, *events: threading.Event) -> None:
        self.events = events

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        is_set = any(event.is_set() for event in self.events)
        return torch.full((len(input_ids),), is_set, device=input_ids.device)


class Pieces(BaseStreamer):
    """The text of one answer as it is written, character by character.

    transformers' own streamers hold a word back until a space follows, and decode all of a line again at each token.

    Args:
        say: takes each piece.
        stop: texts that end the answer; what may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Any, say: Callable[[str], None], stop: Sequence[str]) -> None:
        self.tokenizer, self.say, self.stop = tokenizer, say, stop
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.ended = threading.Event()  # by one of `stop`
        self.ids: list[int] | None = None
        self.text, self.said = "", 0

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:  # the prompt
            self.ids = []
            return
        for token in value.flatten().tolist():
            self.ids.append(token)
            self.text += self.decoder.step(self.tokenizer.backend_tokenizer, token) or ""
        cut = cut_at(self.text, self.stop)
        if len(cut) < len(self.text):
            self.text = cut
            self.ended.set()
        held = 0 if self.ended.is_set() else max((len(each) - 1 for each in self.stop), default=0)
        self._say(len(self.text) - held)

    def end(self) -> None:
        if self.ids and not self.ended.is_set():  # bytes that make no whole character may be left
            self.text = cut_at(self.tokenizer.decode(self.ids, skip_special_tokens=True), self.stop)
        self._say(len(self.text))

    def _say(self, until: int) -> None:
        if until > self.said:
            self.say(self.text[self.said : until])
            self.said = until


def cut_at(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of some texts in it."""
    return text[: min([text.find(each) for each in stop if each in text], default=len(text))]


def answer_ends(tokenizer: Any) -> list[int]:
    """The tokens that end an answer."""
    ends = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id}
    return sorted(end for end in ends if end is not None)
