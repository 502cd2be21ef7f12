"""A record -> a sample, made when it is asked for: no disk or memory goes to visual tokens."""

import functools
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from jinja2 import TemplateError as JinjaError

from ..media import Clip
from ..records.clips import decode_clip
from ..records.report import DatasetError
from ..video.fit import SHRINK_STAGES, most_tokens, shrink
from ..video.probe import ClipError
from ..video.reader import ClipReader, as_clip, plan_digest
from ..video.sampling import FramePlan, Sampling, SamplingError
from .pixels import count_image_tokens
from .tokens import IGNORE_INDEX, TemplateError, encode_text, expand_pads, place_messages, render

_SHRINK_STEPS = 64  # sizes of a clip that are told apart when it is made smaller
_TURN_TOKENS = 16  # more than the layout around a turn takes


def encode_conversation(
    row: dict[str, Any],
    plans: Sequence[FramePlan],
    tokenizer: Any,
    processor: Any,
    sampling: Sampling,
    thinking: bool = False,
    default_system: str = "",
    generation: bool = False,
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a row of `table.FEATURES`.

    Args:
        plans: of the row's clips, in order.
        sampling: of its images.
        generation: prompt ids alone, up to the last answer, and that answer's ids as labels.

    Raises:
        ClipError, TemplateError: if it cannot be shown.
    """
    image_tokens = [count_image_tokens(image, processor.image_processor, sampling) for image in row["_images"] or ()]
    to_place = list(plans)
    # Other formats than ours keep the newline after <video>; the model is to be trained as it will be asked.
    stripped = not row.get("_source")
    messages = place_messages([*row["_prompt"], *row["_response"]], to_place, strip=stripped)
    system, tools = row["_system"] or default_system, row["_tools"]
    pads = processor.image_token_id, processor.video_token_id
    whole = render(tokenizer, messages, system, tools, ask=False)
    if generation:
        prompt = render(tokenizer, messages[:-1], system, tools, ask=True)
        answer = whole[len(prompt) :] if whole.startswith(prompt) else f"{messages[-1]['content']}<|im_end|>\n"
        ids, labels = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
        return expand_pads(ids, None, image_tokens, plans, *pads)[0], labels
    return expand_pads(*encode_text(tokenizer, whole, thinking), image_tokens, plans, *pads)


class RecordEncoder:
    """Rows of `FEATURES` -> what LLaMA-Factory's collator takes, made when a record is asked for.

    Args:
        reader: of clips.
        cutoff_len: the most tokens that a record may have; none is cut.
        shrink: clips of a longer record lose pixels, then frames, until it fits (`sampling.shrink`).
        generation: prompts alone in `input_ids`, the last answer in `labels`.
        train_on_prompt: labels on the prompt's text too.
        last_turn_only: labels on the last answer alone (LLaMA-Factory's `mask_history`).
    """

    def __init__(
        self,
        tokenizer: Any,
        processor: Any,
        reader: ClipReader,
        cutoff_len: int,
        shrink: bool = False,
        thinking: bool = False,
        default_system: str = "",
        generation: bool = False,
        train_on_prompt: bool = False,
        last_turn_only: bool = False,
    ) -> None:
        self.tokenizer, self.processor, self.reader = tokenizer, processor, reader
        self.cutoff_len, self.shrink = cutoff_len, shrink
        self.thinking, self.default_system = thinking, default_system
        self.generation, self.train_on_prompt, self.last_turn_only = generation, train_on_prompt, last_turn_only

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """A batch of columns -> a batch of columns, as `Dataset.with_transform` wants it; see `item`."""
        names = list(rows)
        items = [self.item(dict(zip(names, values, strict=True))) for values in zip(*rows.values(), strict=True)]
        return {name: [item[name] for item in items] for name in items[0]}

    def item(self, row: dict[str, Any]) -> dict[str, Any]:
        """One record as an item of the data set: what `encode` makes, and under `show` a function that reads its clips.

        The collator calls `show`, so what asks for lengths alone decodes nothing.
        """
        sample = self.encode(row)
        return {**sample, "show": functools.partial(self.show, row, sample)}

    def show(self, row: dict[str, Any], sample: dict[str, Any] | None = None) -> dict[str, Any]:
        """One record as the collator takes it, with the frames of its clips in `videos`, as `ShownClip`.

        Args:
            sample: what `encode` made of the row.

        Raises:
            DatasetError: naming the record, if it cannot be shown or is too long.
        """
        while True:
            sample = dict(sample or self.encode(row))
            plans, _ = sample.pop("plans"), sample.pop("change")
            if not plans:
                return sample
            try:
                shown = [self.reader.show(replace(decode_clip(video), planned=None)) for video in sample["videos"]]
            except ClipError as error:
                raise DatasetError(f"{source_of(row)}: {error}") from error
            if [clip.plan for clip in shown] == plans:
                return {**sample, "videos": shown}
            sample = None  # decoding has taught that a file is damaged, or another file now

    def encode(self, row: dict[str, Any]) -> dict[str, Any]:
        """One record, without decoding its clips.

        Returns:
            What the collator takes, with the clips as text in `videos`; `plans`, what is shown of them; and `change`,
            what was done to clips to make the record fit, or "".

        Raises:
            DatasetError: naming the record, if it cannot be shown or is too long.
        """
        clips, change = [as_clip(video) for video in row["_videos"] or ()], ""
        ids, labels, plans = self._encode(row, clips)
        if len(ids) > self.cutoff_len:
            lengths = len(ids), self.visual_tokens(ids)
            said = (
                f"{source_of(row)}: {lengths[0]} tokens, {lengths[1]} of them visual, are more than cutoff_len "
                f"{self.cutoff_len}"
            )
            smaller = self._fit(row, clips, plans)
            if smaller is None:
                least = "; even its smallest clips do not fit" if clips else ""
                raise DatasetError(
                    f"{said}{least}; raise cutoff_len to {len(ids)}, or shorten its text", lengths=lengths
                )
            if not self.shrink:
                raise DatasetError(
                    f"{said}; raise cutoff_len to {len(ids)}, or set {_differences(clips, smaller)}", lengths=lengths
                )
            ids, labels, plans = self._encode(row, smaller)
            change = f"{said}: now {len(ids)}, with {_differences(clips, smaller)}"
            clips = smaller
        if not self.generation and self.train_on_prompt:
            pads = (self.processor.image_token_id, self.processor.video_token_id)
            labels = [IGNORE_INDEX if token in pads else token for token in ids]
            labels[0] = IGNORE_INDEX  # nothing tells it, and the loss is divided by the number of labels
        elif not self.generation and self.last_turn_only:
            last = max((i for i, label in enumerate(labels) if label == IGNORE_INDEX), default=-1)
            labels = [IGNORE_INDEX] * (last + 1) + labels[last + 1 :]
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": labels,
            "images": row["_images"],
            "videos": [
                replace(clip, planned=plan_digest(plan)).encode() for clip, plan in zip(clips, plans, strict=True)
            ]
            or None,
            "audios": None,
            "plans": plans,
            "change": change,
        }

    def visual_tokens(self, ids: list[int]) -> int:
        """How many of the tokens are visual."""
        return ids.count(self.processor.image_token_id) + ids.count(self.processor.video_token_id)

    def may_be_too_long(self, row: dict[str, Any]) -> bool:
        """Whether the record can be longer than the cutoff; no clip is looked at for that."""
        if row["_tools"] or self.default_system:
            return True
        turns = [*row["_prompt"], *row["_response"]]
        texts = [row["_system"] or "", *(turn["content"] for turn in turns)]
        most = sum(len(text.encode()) + _TURN_TOKENS for text in texts)  # a token is at least a byte
        try:
            clips = [as_clip(video) for video in row["_videos"] or ()]
            most += sum(
                most_tokens(self.reader.sampling.override(**clip.settings), len(clip.frames) if clip.frames else None)
                for clip in clips
            )
        except SamplingError:
            return True
        return most > self.cutoff_len or bool(row["_images"])

    def _encode(self, row: dict[str, Any], clips: list[Clip]) -> tuple[list[int], list[int], list[FramePlan]]:
        try:
            plans = [self.reader.plan(clip) for clip in clips]
            encoded = encode_conversation(
                row,
                plans,
                self.tokenizer,
                self.processor,
                self.reader.sampling,
                self.thinking,
                self.default_system,
                self.generation,
            )
            return *encoded, plans
        except (ClipError, TemplateError) as error:
            raise DatasetError(f"{source_of(row)}: {error}") from error
        except (JinjaError, TypeError) as error:
            raise DatasetError(f"{source_of(row)}: the model's chat template cannot write it ({error})") from error

    def _fit(self, row: dict[str, Any], clips: list[Clip], plans: list[FramePlan]) -> list[Clip] | None:
        """The clips, smaller by as little as makes the record fit; None if nothing does. All go down together."""

        def tried(stage: int, step: int) -> list[Clip] | None:
            smaller = []
            for clip, plan in zip(clips, plans, strict=True):
                settings = shrink(self.reader.sampling.override(**clip.settings), plan, stage, step / _SHRINK_STEPS)
                smaller.append(replace(clip, **settings))
            try:
                return smaller if len(self._encode(row, smaller)[0]) <= self.cutoff_len else None
            except DatasetError:  # so few pixels that nothing is left of a frame
                return None

        for stage in range(SHRINK_STAGES if clips else 0):
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

    def describe(self, sample: dict[str, Any]) -> str:
        """A sample as a person reads it, with its runs of visual tokens counted."""
        from .tokens import IMAGE_PAD, VIDEO_PAD

        text = self.tokenizer.decode(sample["input_ids"], skip_special_tokens=False)
        for pad in (IMAGE_PAD, VIDEO_PAD):
            text = re.sub(f"({re.escape(pad)})+", lambda run, pad=pad: f"{pad}*{len(run[0]) // len(pad)}", text)
        said = [label for label in sample["labels"] if label != IGNORE_INDEX]
        answer = self.tokenizer.decode(said, skip_special_tokens=False)
        return f"{text}\nlabels ({len(said)} of {len(sample['input_ids'])} tokens):\n{answer}"


def source_of(row: dict[str, Any]) -> str:
    return row.get("_source") or "a record"


def _differences(clips: list[Clip], smaller: list[Clip]) -> str:
    """The settings in which clips were made smaller, for a person."""
    told = []
    for old, new in zip(clips, smaller, strict=True):
        names = [f.name for f in fields(Clip) if getattr(old, f.name) != getattr(new, f.name)]
        told.append(f"{', '.join(f'{name} {getattr(new, name)}' for name in names)} for {old}")
    return "; ".join(told)
