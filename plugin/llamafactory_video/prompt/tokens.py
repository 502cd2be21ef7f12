"""A conversation -> token ids and labels.

The text is rendered by the model's own chat template and tokenized in one piece, so ids equal those of
`Qwen3VLProcessor.apply_chat_template` by construction (one exception: `encode_text`, on thinking models). Clips and
images stand in it with one pad token for each time that the prompt names; `expand_pads` then repeats each as often as
its FramePlan says, in ids, where a few thousand tokens cost microseconds.
"""

import bisect
import itertools
import json
import operator
import re
from collections.abc import Container, Sequence
from typing import Any

from ..families import QWEN3_VL
from ..media import FUNCTION, IMAGE_PLACEHOLDER, TOOL, USER, VIDEO_PLACEHOLDER
from ..video.sampling import FramePlan

IGNORE_INDEX = -100


class TemplateError(ValueError):
    """A conversation, or a model, that the template cannot serve."""


def place_media(text: str, plans: list[FramePlan]) -> str:
    """The text with each placeholder replaced by its layout, with one pad for each image and each time of a clip.

    Args:
        plans: those of the clips still to come in the conversation; the ones shown here are taken from its front.
    """
    pieces = re.split(f"({IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER})", text)
    for i, piece in enumerate(pieces):
        if piece == IMAGE_PLACEHOLDER:
            pieces[i] = f"{QWEN3_VL.vision_start}{QWEN3_VL.image_pad}{QWEN3_VL.vision_end}"
        elif piece == VIDEO_PLACEHOLDER:
            if not plans:
                raise TemplateError("there are more <video> placeholders than clips")
            times = plans.pop(0).timestamps
            pieces[i] = "".join(
                f"<{time:.1f} seconds>{QWEN3_VL.vision_start}{QWEN3_VL.video_pad}{QWEN3_VL.vision_end}"
                for time in times
            )
    return "".join(pieces)


def place_messages(messages: Sequence[dict[str, str]], plans: Sequence[FramePlan]) -> list[dict[str, str]]:
    """Messages with clips and images laid out, in human and tool turns; see `place_media`."""
    left = list(plans)
    return [
        {**message, "content": place_media(message["content"], left)} if message["role"] in (USER, TOOL) else message
        for message in messages
    ]


def expand_pads(
    ids: list[int],
    labels: list[int] | None,
    image_tokens: Sequence[int],
    plans: Sequence[FramePlan],
    image_pad_id: int,
    video_pad_id: int,
) -> tuple[list[int], list[int] | None]:
    """Repeat each pad token as often as there are visual tokens behind it.

    Args:
        ids, labels: with one pad for each image and each time of a clip, (n,).
        image_tokens: visual tokens of each image, in order.
        plans: of each clip, in order.

    Returns:
        ids and labels with all visual tokens, (m,).

    Raises:
        TemplateError: if ids hold another number of pads, as when a text spells one out.
    """
    per_time = [plan.tokens_per_timestamp for plan in plans for _ in range(plan.grid[0])]
    repeats = {image_pad_id: iter(image_tokens), video_pad_id: iter(per_time)}
    for name, pad_id, counts in (
        (QWEN3_VL.image_pad, image_pad_id, image_tokens),
        (QWEN3_VL.video_pad, video_pad_id, per_time),
    ):
        found = ids.count(pad_id)
        if found != len(counts):
            raise TemplateError(
                f"the prompt holds {found} {name} but {len(counts)} are expected; remove it from texts"
            )
    runs = [(at, next(repeats[token])) for at, token in enumerate(ids) if token in repeats]

    def expand(values: list[int]) -> list[int]:
        expanded, done = [], 0
        for at, count in runs:
            expanded += values[done:at]
            expanded += values[at : at + 1] * count
            done = at + 1
        return expanded + values[done:]

    return expand(ids), None if labels is None else expand(labels)


def chat_messages(messages: Sequence[dict[str, str]], system: str | None) -> list[dict[str, Any]]:
    """LLaMA-Factory's messages in the form of `apply_chat_template`, with tool turns under their names there."""
    chat: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for message in messages:
        role, content = str(message["role"]), message["content"]
        if role == TOOL:
            chat.append({"role": "tool", "content": content})
        elif role == FUNCTION:
            chat.append({"role": "assistant", **_function_turn(content)})
        else:
            chat.append({"role": role, "content": content})
    return chat


def _function_turn(text: str) -> dict[str, Any]:
    """A function turn's content and tool_calls, from our records or as LLaMA-Factory writes them: one call or a list."""
    try:
        turn = json.loads(text)
    except ValueError as error:
        raise TemplateError(f"a function_call turn is not JSON: {text[:80]}") from error
    if isinstance(turn, dict) and "tool_calls" in turn:
        return turn
    calls = turn if isinstance(turn, list) else [turn]
    return {"content": "", "tool_calls": [{"function": call} for call in calls]}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as OpenAI and the model's training data have it; LLaMA-Factory's records and API hold its inside alone."""
    return tool if tool.get("type") == "function" else {"type": "function", "function": tool}


def render(
    tokenizer: Any, messages: Sequence[dict[str, str]], system: str | None, tools: str | None, ask: bool
) -> str:
    """The conversation as the model's chat template writes it.

    Args:
        messages: with `role` and `content`, in LLaMA-Factory's roles; media already placed.
        tools: JSON text of a list of tools.
        ask: end where the assistant begins to speak.
    """
    return tokenizer.apply_chat_template(
        chat_messages(messages, system),
        tools=[_tool(tool) for tool in json.loads(tools)] if tools else None,
        tokenize=False,
        add_generation_prompt=ask,
    )


def check_chat_template(tokenizer: Any, thinking: bool) -> None:
    """Raise TemplateError unless the model asks in the way that the template's name says."""
    if not tokenizer.chat_template:
        raise TemplateError("the model's folder has no chat template; copy chat_template.json from the original model")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
    )
    if not asked.endswith(QWEN3_VL.thinking_start if thinking else QWEN3_VL.answer_start):
        right = "qwen3_vl_video" if thinking else "qwen3_vl_video_thinking"
        raise TemplateError(f"this model's chat template asks with {asked[-40:]!r}; is `template: {right}` meant?")


def encode_text(
    tokenizer: Any, text: str, thinking: bool, unlearnt: Container[int] = ()
) -> tuple[list[int], list[int]]:
    """Token ids of a rendered conversation, and labels on what the assistant says.

    Labels cover each answer, its `<|im_end|>` and the newline after it, in every turn, as in the official trainer.
    A token that begins before the answer and reaches into it (newlines merge) counts as said.

    A thinking model is asked with `<think>` and a newline. In one piece, that newline would merge with those of an
    empty thought, and the model would never learn to continue from how it is asked. So there, and only there, the text
    is cut where the assistant begins to speak.

    Args:
        unlearnt: numbers of the answers that get no labels, counted from 0.

    Returns:
        ids and labels, (n,) each.
    """
    start = f"{re.escape(QWEN3_VL.answer_start)}(?:<think>\n)?" if thinking else re.escape(QWEN3_VL.answer_start)
    spans = [match.span(1) for match in re.finditer(f"{start}(.*?<\\|im_end\\|>\n)", text, re.DOTALL)]
    cuts = [0, *(begin for begin, _ in spans if thinking), len(text)]
    backend = tokenizer.backend_tokenizer  # the wrapper around it takes a third of the time
    backend.no_truncation()
    backend.no_padding()
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for cut, following in itertools.pairwise(cuts):
        encoded = backend.encode(text[cut:following], add_special_tokens=False)
        ids += encoded.ids
        offsets += encoded.offsets if not cut else [(begin + cut, end + cut) for begin, end in encoded.offsets]
    labels = [IGNORE_INDEX] * len(ids)
    for number, (begin, end) in enumerate(spans):
        if number in unlearnt:
            continue
        first = bisect.bisect_right(offsets, begin, key=operator.itemgetter(1))  # ends after the answer begins
        last = bisect.bisect_left(offsets, end, key=operator.itemgetter(0))  # begins before it ends
        labels[first:last] = ids[first:last]
    return ids, labels
