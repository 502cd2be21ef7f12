"""Answers that are JSON of a schema, whatever the model: tokens that would leave it are not written.

llguidance tells which tokens may follow (https://github.com/guidance-ai/llguidance). It knows nothing of the room that an
answer has, so that one cut off would not be JSON: here an answer is closed in time.
"""

import json
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.torch import fill_next_token_bitmask_par
from transformers import LogitsProcessor

# \u would hide Chinese, and could be half a character. White space is that of one line or of indented lines: a model that
# would rather write something else has nothing but white space left to write, and would go on with it.
_OPTIONS = {"json_allowed_escapes": 'nrbtf\\"', "whitespace_pattern": r"(\n[ \t]{0,40}|[ ]?)"}
_LONGEST = 4096  # tokens of a shortest answer
_SLACK = 16  # tokens by which one token may lengthen what is left to write, beside a part of the schema


class SchemaError(ValueError):
    """A JSON Schema that answers cannot be held to."""


class Grammar:
    """A schema for one tokenizer.

    Attributes:
        shortest: tokens of the shortest answer that was found.
        growth: tokens by which one more token may lengthen the shortest end of an answer.
    """

    def __init__(self, schema: dict[str, Any] | bool, tokenizer: LLTokenizer) -> None:
        """Compile.

        Raises:
            SchemaError: if the schema is wrong, or has what llguidance cannot hold answers to.
        """
        self.tokenizer = tokenizer
        self.start = _matcher(schema, tokenizer)
        # What ends an answer soonest, inside a string and outside.
        inside, outside = '"a', '}],:"10ntf[{'  # 1 before 0: above -5, -0.000 never ends
        self._preferred = [[tokenizer.tokenize_str(each)[-1] for each in group] for group in (outside, inside)]
        self.shortest = len(self.closing(self.start))
        parts = [len(self.closing(part)) for part in _parts(schema, tokenizer)]
        self.growth = max([self.shortest, *parts]) + _SLACK

    def closing(self, matcher: LLMatcher, written: Sequence[int] = ()) -> list[int]:
        """Tokens that end an answer soon, from where a matcher stands.

        Args:
            written: the answer's tokens so far.

        Raises:
            SchemaError: if none were found.
        """
        matcher, tokens = matcher.deep_copy(), []
        while not matcher.is_accepting():
            following = matcher.compute_ff_tokens()
            if not following:
                bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
                allowed = np.unpackbits(bits, bitorder="little")
                preferred = self._preferred[_is_in_string(self.tokenizer.decode_bytes([*written, *tokens]))]
                following = [next((each for each in preferred if allowed[each]), int(allowed.argmax()))]
            tokens += following
            if not matcher.consume_tokens(following) or len(tokens) > _LONGEST:
                raise SchemaError(
                    f"found no answer of fewer than {_LONGEST} tokens of this schema. {matcher.get_error()}".strip()
                )
        return tokens


def _is_in_string(text: bytes) -> bool:
    """Whether JSON text that goes on stands inside a string."""
    inside, is_escaped = False, False
    for byte in text:
        if is_escaped:
            is_escaped = False
        elif inside and byte == ord("\\"):
            is_escaped = True
        elif byte == ord('"'):
            inside = not inside
    return inside


def _matcher(schema: dict[str, Any] | bool, tokenizer: LLTokenizer) -> LLMatcher:
    text = json.dumps(schema, ensure_ascii=False)
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS))
    if matcher.is_error():
        reason = matcher.get_error().strip().splitlines()[0]
        raise SchemaError(f"answers cannot be held to this JSON Schema: {reason}")
    return matcher


def _parts(schema: Any, tokenizer: LLTokenizer) -> list[LLMatcher]:
    """The schemas inside a schema; those that say nothing without the rest are left out."""
    definitions = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema, dict) and key in schema}
    found, waiting = [], [schema]
    while waiting:
        part = waiting.pop()
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        if isinstance(part, dict) and part is not schema and {"type", "anyOf", "oneOf", "allOf", "enum"} & part.keys():
            try:
                found.append(_matcher(definitions | part, tokenizer))
            except (SchemaError, ValueError):
                continue
    return found


class Grammars:
    """Schemas for one tokenizer, each compiled once."""

    def __init__(self, tokenizer: Any, ends: Sequence[int]) -> None:
        """Read the vocabulary, which takes about a second.

        Args:
            tokenizer: transformers' fast tokenizer.
            ends: tokens that end an answer.
        """
        self._tokenizer = from_tokenizer(tokenizer, eos_token=list(ends))
        self.of_text = lru_cache(64)(lambda text: Grammar(json.loads(text), self._tokenizer))

    def of(self, schema: dict[str, Any]) -> Grammar:
        """The grammar of a JSON Schema.

        Raises:
            SchemaError: see `Grammar`.
        """
        return self.of_text(json.dumps(schema, ensure_ascii=False))


@cache
def _executor() -> LLExecutor:
    """Threads that look at all rows of a batch."""
    return LLExecutor()


class _Row:
    """One answer as it is written."""

    def __init__(self, grammar: Grammar, room: int) -> None:
        self.matcher, self.grammar, self.room = grammar.start.deep_copy(), grammar, room
        self.written: list[int] = []
        self.closing: list[int] = []  # what must follow, once the answer has to end
        self.ended = False
        self._plan(grammar.shortest)

    def _plan(self, length: int) -> None:
        """Look again before the end, `length` tokens long now, could get too long for the room."""
        left = self.room - len(self.written)
        self._look_at = len(self.written) + max(0, (left - length) // (self.grammar.growth + 1))

    def write(self, token: int) -> None:
        if not self.ended:
            self.ended = token in self.grammar.tokenizer.eos_tokens
            self.matcher.consume_token(token)
            self.written.append(token)

    def forced(self) -> int | None:
        """The one token that must follow, if the answer has to end."""
        if not self.closing and len(self.written) == self._look_at:
            closing = self.grammar.closing(self.matcher, self.written)
            if len(self.written) + len(closing) + self.grammar.growth >= self.room:
                self.closing = [*self.written, *closing, self.grammar.tokenizer.eos_token]
            else:
                self._plan(len(closing))
        return self.closing[len(self.written)] if len(self.written) < len(self.closing) else None


class JsonAnswers(LogitsProcessor):
    """Holds the answers of a batch to their schemas, for transformers' `generate`."""

    def __init__(self, grammars: Sequence[Grammar | None], max_new_tokens: int) -> None:
        """Begin answers.

        Args:
            grammars: of each row; None: any text.
            max_new_tokens: the most tokens of an answer.

        Raises:
            SchemaError: if that is too few for an answer.
        """
        for grammar in grammars:
            if grammar is not None and grammar.shortest > max_new_tokens:
                raise SchemaError(
                    f"max_new_tokens is {max_new_tokens}; the shortest answer of this JSON Schema has {grammar.shortest} tokens"
                )
        self._rows = [None if grammar is None else _Row(grammar, max_new_tokens) for grammar in grammars]
        self._prompt: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores with those of tokens that may not follow at minus infinity; (batch, vocabulary)."""
        if self._prompt is None:
            self._prompt = input_ids.shape[1]
        elif input_ids.shape[1] > self._prompt:
            for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
                if row is not None:
                    row.write(token)
        held = [(number, row) for number, row in enumerate(self._rows) if row is not None and not row.ended]
        if not held:
            return scores
        size = held[0][1].grammar.tokenizer.vocab_size
        mask = torch.full((len(scores), (size + 31) // 32), -1, dtype=torch.int32)
        fill_next_token_bitmask_par(_executor(), [(row.matcher, number) for number, row in held], mask)
        for number, row in held:
            if (token := row.forced()) is not None:
                mask[number] = 0
                bit = token % 32
                mask[number, token // 32] = (1 << bit) - (1 << 32 if bit == 31 else 0)
        numbers = [number for number, _ in held]
        bits = mask[numbers].to(scores.device, non_blocking=True)
        shifts = torch.arange(32, device=scores.device, dtype=torch.int32)
        allowed = ((bits[:, :, None] >> shifts) & 1).flatten(1).bool()[:, : scores.shape[1]]
        missing = scores.shape[1] - allowed.shape[1]  # a model may have more rows than there are tokens
        allowed = torch.nn.functional.pad(allowed, (0, missing))
        kept = scores.clone()
        kept[numbers] = scores[numbers].masked_fill(~allowed, -torch.inf)
        return kept
