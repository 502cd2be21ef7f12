"""Rows of a data set as LLaMA-Factory's collator takes them: encoded when they are asked for, or packed."""

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..media import Conversation
from ..prompt.encoder import Encoder, Sample
from ..prompt.left_out import LeftOut
from ..records.report import DatasetError
from ..video.reader import DecodedClip
from .core import is_ours, replace_everywhere
from .prompt import clip_reader_of
from .rows import from_row


def make_encoder(template: Any, tokenizer: Any, processor: Any, data_args: Any, generation: bool = False) -> Encoder:
    """The encoder that a recipe asks for."""
    return Encoder(
        tokenizer,
        processor,
        clip_reader_of(processor),
        cutoff_len=data_args.cutoff_len,
        shrink=data_args.video_fit == "shrink",
        thinking=template.thinking,
        default_system=template.default_system,
        generation=generation,
        train_on_prompt=data_args.train_on_prompt,
        last_turn_only=data_args.mask_history,
    )


class Items:
    """Rows of a data set -> items as LLaMA-Factory's collator takes them, made when a row is asked for.

    Args:
        left_out: takes records that turn out not to be shown. In their place comes a text from which nothing is learnt: all
            processes do the same steps. None: such a record is an error.
    """

    def __init__(self, encoder: Encoder, left_out: LeftOut | None = None) -> None:
        self.encoder, self.left_out = encoder, left_out

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """A batch of columns -> a batch of columns, as `Dataset.with_transform` wants it."""
        names = list(rows)
        items = [self.item(dict(zip(names, values, strict=True))) for values in zip(*rows.values(), strict=True)]
        return {name: [item[name] for item in items] for name in items[0]}

    def item(self, row: dict[str, Any]) -> dict[str, Any]:
        """One row: its sample, and under `load` a function that decodes its clips too.

        The collator calls it, so what asks for lengths alone decodes nothing.
        """
        return self.of(from_row(row))

    def of(self, conversation: Conversation) -> dict[str, Any]:
        """The same of a conversation."""
        try:
            sample = self.encoder.encode(conversation)
        except DatasetError as error:
            sample = self._without(error)
            return {**as_item(sample, None), "load": functools.partial(as_item, sample, None)}
        return {**as_item(sample, None), "load": functools.partial(self.load, conversation, sample)}

    def load(self, conversation: Conversation, sample: Sample) -> dict[str, Any]:
        """A sample with its pictures and decoded clips."""
        try:
            return as_item(*self.encoder.load(conversation, sample))
        except DatasetError as error:
            return as_item(self._without(error), None)

    def _without(self, error: DatasetError) -> Sample:
        if self.left_out is None:
            raise error
        self.left_out.add(str(error))
        return self.encoder.nothing()


def as_item(sample: Sample, clips: list[DecodedClip] | None) -> dict[str, Any]:
    """A sample as LLaMA-Factory's collator takes it."""
    return {
        "input_ids": sample.ids,
        "attention_mask": [1] * len(sample.ids),
        "labels": sample.labels,
        "images": sample.images or None,
        "videos": clips or None,
        "audios": None,
    }


def extend_packing(supervised: ModuleType) -> None:
    """`neat_packing` packs what our own encoding makes; a record over the cutoff is an error, not cut."""
    stock = supervised.PackedSupervisedDatasetProcessor

    @dataclass
    class PackedSupervisedDatasetProcessor(stock):
        def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
            if is_ours(self.template):
                encoder = make_encoder(self.template, self.tokenizer, self.processor, self.data_args)
                rows = [dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)]
                samples = [encoder.encode(from_row(row)) for row in rows]
                self.samples = iter(samples)
                # The stock method drops conversations whose turns do not alternate, such as two results of tools.
                examples = {**examples, "_prompt": [[{}]] * len(rows), "_response": [[{}]] * len(rows)}
                # As small as they were planned; the digest tells when pixels are read whether the plan is still the same.
                examples["_videos"] = [
                    [clip.clip.encode(clip.plan.digest) for clip in sample.clips] or None for sample in samples
                ]
            return super().preprocess_dataset(examples)

        def _encode_data_example(self, prompt, response, system, tools, images, videos, audios):
            if not is_ours(self.template):
                return super()._encode_data_example(prompt, response, system, tools, images, videos, audios)
            sample = next(self.samples)
            return sample.ids, sample.labels

    replace_everywhere(supervised, "PackedSupervisedDatasetProcessor", PackedSupervisedDatasetProcessor)
