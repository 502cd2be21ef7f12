"""A record -> a sample, made when it is asked for: no disk or memory goes to visual tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from jinja2 import TemplateError as JinjaError

from ..families import QWEN3_VL
from ..media import ASSISTANT, FUNCTION, Clip, Conversation
from ..records.report import DatasetError
from ..video.fit import SHRINK_STAGES, most_tokens, shrink
from ..video.pictures import open_picture
from ..video.probe import ClipError
from ..video.reader import ATTEMPTS, ClipReader, DecodedClip, OutdatedPlan, PlannedClip, as_clip
from ..video.sampling import FramePlan, Sampling, SamplingError
from .pixels import count_image_tokens
from .tokens import IGNORE_INDEX, TemplateError, encode_text, expand_pads, place_messages, render

_SHRINK_STEPS = 64  # sizes of a clip that are told apart when it is made smaller
_TURN_TOKENS = 16  # more than the layout around a turn takes


@dataclass(frozen=True)
class Sample:
    """What the model is given of a conversation, but for pixels.

    Attributes:
        ids: token ids, visual ones expanded, (n,).
        labels: (n,), -100 where nothing is learnt; of a prompt for generation, the answer's ids.
        images: pictures, in order of their tokens.
        clips: planned clips, in order of their tokens.
        change: what was done to clips to make it fit, or "".
    """

    ids: list[int]
    labels: list[int]
    images: list[Any]
    clips: list[PlannedClip]
    change: str = ""


def encode_conversation(
    conversation: Conversation,
    plans: Sequence[FramePlan],
    tokenizer: Any,
    processor: Any,
    sampling: Sampling,
    thinking: bool = False,
    default_system: str = "",
    generation: bool = False,
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation.

    Args:
        plans: of its clips, in order.
        sampling: of its images.
        generation: prompt ids alone, up to the last answer, and that answer's ids as labels.

    Raises:
        ClipError, TemplateError: if it cannot be shown.
    """
    image_tokens = [count_image_tokens(image, processor.image_processor, sampling) for image in conversation.images]
    messages = place_messages([{"role": role, "content": text} for role, text in conversation.messages], plans)
    system, tools = conversation.system or default_system, conversation.tools
    pads = processor.image_token_id, processor.video_token_id
    whole = render(tokenizer, messages, system, tools, ask=False)
    if generation:
        prompt = render(tokenizer, messages[:-1], system, tools, ask=True)
        answer = whole[len(prompt) :] if whole.startswith(prompt) else f"{messages[-1]['content']}<|im_end|>\n"
        ids, labels = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
        return expand_pads(ids, None, image_tokens, plans, *pads)[0], labels
    answers = [number for number, (role, _) in enumerate(conversation.messages) if role in (ASSISTANT, FUNCTION)]
    unlearnt = {at for at, number in enumerate(answers) if number in conversation.unlearnt}
    return expand_pads(*encode_text(tokenizer, whole, thinking, unlearnt), image_tokens, plans, *pads)


@dataclass
class Encoder:
    """Conversation -> `Sample`, made when it is asked for; and the frames of its plans.

    Args:
        reader: of clips.
        cutoff_len: the most tokens that a record may have; none is cut.
        shrink: clips of a longer record lose pixels, then frames, until it fits (`video.fit.shrink`).
        generation: prompts alone in `ids`, the last answer in `labels`.
        train_on_prompt: labels on the prompt's text too.
        last_turn_only: labels on the last answer alone (LLaMA-Factory's `mask_history`).
    """

    tokenizer: Any
    processor: Any
    reader: ClipReader
    cutoff_len: int
    shrink: bool = False
    thinking: bool = False
    default_system: str = ""
    generation: bool = False
    train_on_prompt: bool = False
    last_turn_only: bool = False

    def load(self, conversation: Conversation, sample: Sample | None = None) -> tuple[Sample, list[DecodedClip]]:
        """A sample with its pictures opened, and the frames of its clips, which agree with it: where a file yields other
        frames than planned, both are anew.

        Args:
            sample: what `encode` made of the conversation, if it has.

        Raises:
            DatasetError: naming the record, if it cannot be shown or is too long.
        """
        for _ in range(ATTEMPTS):
            sample = sample or self.encode(conversation)
            try:
                pictures = [open_picture(image) for image in sample.images]
                return replace(sample, images=pictures), [self.reader.decode(clip) for clip in sample.clips]
            except OutdatedPlan:
                sample = None
            except ClipError as error:
                raise DatasetError(f"{conversation.name}: {error}") from error
        raise DatasetError(f"{conversation.name}: its clips change while they are read")

    def encode(self, conversation: Conversation) -> Sample:
        """A conversation as a sample; no clip is decoded.

        Raises:
            DatasetError: naming the record, if it cannot be shown or is too long.
        """
        try:
            pictures = [self.reader.at_hand(image) for image in conversation.images]
        except ClipError as error:
            raise DatasetError(f"{conversation.name}: {error}") from error
        conversation = replace(conversation, images=pictures)
        clips, change = [as_clip(video) for video in conversation.videos], ""
        ids, labels, planned = self._encode(conversation, clips)
        if len(ids) > self.cutoff_len:
            lengths = len(ids), self.visual_tokens(ids)
            said = (
                f"{conversation.name}: {lengths[0]} tokens, {lengths[1]} of them visual, are more than cutoff_len "
                f"{self.cutoff_len}"
            )
            smaller = self._fit(conversation, planned)
            if smaller is None:
                least = "; even its smallest clips do not fit" if clips else ""
                raise DatasetError(
                    f"{said}{least}; raise cutoff_len to {len(ids)}, or shorten its text", lengths=lengths
                )
            if not self.shrink:
                raise DatasetError(
                    f"{said}; raise cutoff_len to {len(ids)}, or set {_differences(clips, smaller)}", lengths=lengths
                )
            ids, labels, planned = self._encode(conversation, smaller)
            change = f"{said}: now {len(ids)}, with {_differences(clips, smaller)}"
        if not self.generation and conversation.unlearnt and self.train_on_prompt:
            raise DatasetError(
                f"{conversation.name}: it has answers with `loss: false`; train_on_prompt trains on all"
            )
        if not self.generation and self.train_on_prompt:
            pads = (self.processor.image_token_id, self.processor.video_token_id)
            labels = [IGNORE_INDEX if token in pads else token for token in ids]
            labels[0] = IGNORE_INDEX  # nothing tells it, and the loss is divided by the number of labels
        elif not self.generation and self.last_turn_only:
            last = max((i for i, label in enumerate(labels) if label == IGNORE_INDEX), default=-1)
            labels = [IGNORE_INDEX] * (last + 1) + labels[last + 1 :]
            if len(conversation.messages) - 1 in conversation.unlearnt:
                raise DatasetError(
                    f"{conversation.name}: its last answer has `loss: false`; mask_history trains on no other"
                )
        return Sample(ids, labels, list(conversation.images), planned, change)

    def nothing(self) -> Sample:
        """In place of a sample that cannot be shown: a text from which nothing is learnt."""
        ids = self.tokenizer("(left out)", add_special_tokens=False)["input_ids"]
        return Sample(ids, [IGNORE_INDEX] * len(ids), [], [])

    def visual_tokens(self, ids: list[int]) -> int:
        """How many of the tokens are visual."""
        return ids.count(self.processor.image_token_id) + ids.count(self.processor.video_token_id)

    def may_be_too_long(self, conversation: Conversation) -> bool:
        """Whether the record can be longer than the cutoff; no clip is looked at for that."""
        if conversation.tools or self.default_system or conversation.images:
            return True
        texts = [conversation.system, *(text for _, text in conversation.messages)]
        most = sum(len(text.encode()) + _TURN_TOKENS for text in texts)  # a token is at least a byte
        try:
            for clip in map(as_clip, conversation.videos):
                sampling = self.reader.sampling.override(**clip.settings)
                most += most_tokens(sampling, len(clip.frames) if clip.frames else None)
        except SamplingError:
            return True
        return most > self.cutoff_len

    def _encode(self, conversation: Conversation, clips: list[Clip]) -> tuple[list[int], list[int], list[PlannedClip]]:
        try:
            planned = [self.reader.plan(clip) for clip in clips]
            encoded = encode_conversation(
                conversation,
                [clip.plan for clip in planned],
                self.tokenizer,
                self.processor,
                self.reader.sampling,
                self.thinking,
                self.default_system,
                self.generation,
            )
            return *encoded, planned
        except (ClipError, TemplateError) as error:
            raise DatasetError(f"{conversation.name}: {error}") from error
        except (JinjaError, TypeError) as error:
            raise DatasetError(f"{conversation.name}: the model's chat template cannot render it ({error})") from error

    def _fit(self, conversation: Conversation, planned: list[PlannedClip]) -> list[Clip] | None:
        """The clips, smaller by as little as makes the record fit; None if nothing does. All go down together."""

        def tried(stage: int, step: int) -> list[Clip] | None:
            smaller = []
            for clip in planned:
                sampling = self.reader.sampling.override(**clip.clip.settings)
                smaller.append(replace(clip.clip, **shrink(sampling, clip.plan, stage, step / _SHRINK_STEPS)))
            try:
                return smaller if len(self._encode(conversation, smaller)[0]) <= self.cutoff_len else None
            except DatasetError:  # so few pixels that nothing is left of a frame
                return None

        for stage in range(SHRINK_STAGES if planned else 0):
            best = tried(stage, 0)
            if best is None:
                continue
            low, high = 0, _SHRINK_STEPS
            while high - low > 1:
                middle = (low + high) // 2
                larger = tried(stage, middle)
                if larger is None:
                    high = middle
                else:
                    best, low = larger, middle
            return best
        return None

    def describe(self, sample: Sample) -> str:
        """A sample as a person reads it, with its runs of visual tokens counted."""
        text = self.tokenizer.decode(sample.ids, skip_special_tokens=False)
        for pad in (QWEN3_VL.image_pad, QWEN3_VL.video_pad):
            text = re.sub(f"({re.escape(pad)})+", lambda run, pad=pad: f"{pad}*{len(run[0]) // len(pad)}", text)
        said = [label for label in sample.labels if label != IGNORE_INDEX]
        answer = self.tokenizer.decode(said, skip_special_tokens=False)
        return f"{text}\nlabels ({len(said)} of {len(sample.ids)} tokens):\n{answer}"


def _differences(clips: list[Clip], smaller: list[Clip]) -> str:
    """The settings in which clips were made smaller, for a person."""
    told = []
    for old, new in zip(clips, smaller, strict=True):
        names = [f.name for f in fields(Clip) if getattr(old, f.name) != getattr(new, f.name)]
        told.append(f"{', '.join(f'{name} {getattr(new, name)}' for name in names)} for {old}")
    return "; ".join(told)
