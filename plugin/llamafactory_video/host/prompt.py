"""The templates, and clips and pictures in LLaMA-Factory's collator, chat and API."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from ..media import IMAGE_PLACEHOLDER, TOOL, USER, VIDEO_PLACEHOLDER, strip_around_placeholders
from ..model.processor import SamplingProcessor
from ..prompt.flat import lay_flat
from ..prompt.pixels import count_image_tokens, token_type_ids, vision_inputs
from ..prompt.tokens import (
    IGNORE_INDEX,
    TemplateError,
    check_chat_template,
    encode_text,
    expand_pads,
    place_messages,
    render,
)
from ..records.clips import decode_planned_clip
from ..video.probe import ClipError
from ..video.reader import ClipReader, DecodedClip
from .core import TEMPLATE, THINKING_TEMPLATE, is_ours, replace_everywhere


def clip_reader_of(processor: Any) -> ClipReader:
    """The reader of clips of a processor that was prepared for video (model/processor.py)."""
    if not isinstance(processor, SamplingProcessor):
        found = "no processor" if processor is None else type(processor).__name__
        raise ValueError(f"template {TEMPLATE} needs a Qwen3-VL model with its processor files; found {found}")
    return processor.clip_reader


def clip_of(video: Any) -> tuple[Any, str]:
    """What the reader takes of a video that LLaMA-Factory passes on, and the digest of its plan in a packed row."""
    if not isinstance(video, str):
        return video, ""
    try:
        return decode_planned_clip(video)
    except ValueError as error:
        raise ClipError(f"{video}: {error}") from error


def check_placeholders(messages: Sequence[tuple[str, str]], images: Sequence[Any], videos: Sequence[Any]) -> None:
    """See that each picture and clip given with messages has its place in them.

    Args:
        messages: (role, text) in order.

    Raises:
        TemplateError: a ValueError, with both counts.
    """
    text = "".join(text for role, text in messages if role in (USER, TOOL))
    for mark, given in ((VIDEO_PLACEHOLDER, videos), (IMAGE_PLACEHOLDER, images)):
        if text.count(mark) != len(given):
            raise TemplateError(f"{text.count(mark)} {mark} in the messages and {len(given)} given with them")


def _decode(video: Any, reader: ClipReader) -> DecodedClip:
    if isinstance(video, DecodedClip):
        return video
    clip, plan_digest = clip_of(video)
    decoded = reader.read(clip)
    if plan_digest and plan_digest != decoded.plan.digest:
        raise ClipError(
            f"{clip}: the file was replaced or found damaged after its prompt was built. Rerun with `overwrite_cache: true`"
        )
    return decoded


def extend_mm_plugin(mm_plugin: ModuleType) -> None:
    """The multimodal side of the template, for the collator, chat and the API."""

    @dataclass
    class Qwen3VLVideoPlugin(mm_plugin.BasePlugin):
        def process_messages(self, messages, images, videos, audios, processor):
            self._validate_input(processor, images, videos, audios)
            check_placeholders([(message["role"], message["content"]) for message in messages], images, videos)
            plans = [_decode(video, clip_reader_of(processor)).plan for video in videos]
            stripped = [
                {**message, "content": strip_around_placeholders(message["content"])}
                if message["role"] == USER
                else message
                for message in messages
            ]
            return place_messages(stripped, plans)

        def process_token_ids(self, input_ids, labels, images, videos, audios, tokenizer, processor):
            if not input_ids:
                return input_ids, labels
            reader = clip_reader_of(processor)
            image_tokens = [count_image_tokens(image, processor.image_processor, reader.sampling) for image in images]
            plans = [
                reader.plan(clip_of(video)[0]).plan if isinstance(video, str) else _decode(video, reader).plan
                for video in videos
            ]
            return expand_pads(
                input_ids, labels, image_tokens, plans, processor.image_token_id, processor.video_token_id
            )

        def get_mm_inputs(self, images, videos, audios, imglens, vidlens, audlens, batch_ids, processor):
            import torch

            self._validate_input(processor, images, videos, audios)
            reader = clip_reader_of(processor)
            clips = [_decode(video, reader) for video in videos]
            inputs = vision_inputs(images, clips, processor, reader.sampling)
            types = [token_type_ids(torch.tensor(ids), processor).tolist() for ids in batch_ids]
            return {**inputs, "mm_token_type_ids": types}

    if TEMPLATE not in mm_plugin.PLUGINS:
        mm_plugin.register_mm_plugin(TEMPLATE, Qwen3VLVideoPlugin)


def extend_templates(template: ModuleType) -> None:
    """The templates, which render with the model's own chat template."""

    @dataclass
    class VideoTemplate(template.Template):
        video_template: ClassVar[bool] = True
        thinking: ClassVar[bool] = False

        def encode_oneturn(self, tokenizer, messages, system=None, tools=None):

            prompt = render(tokenizer, messages[:-1], system or self.default_system, tools, ask=True)
            response = messages[-1]["content"] + "<|im_end|>\n"
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response))

        def encode_multiturn(self, tokenizer, messages, system=None, tools=None, discarding_history_cot=False):

            text = render(tokenizer, messages, system or self.default_system, tools, ask=False)
            ids, labels = encode_text(tokenizer, text, self.thinking)
            pairs: list[tuple[list[int], list[int]]] = []
            for token, label in zip(ids, labels, strict=True):
                said = label != IGNORE_INDEX
                if not pairs or (not said and pairs[-1][1]):
                    pairs.append(([], []))
                pairs[-1][said].append(token)
            return pairs

        def fix_jinja_template(self, tokenizer) -> None:

            check_chat_template(tokenizer, self.thinking)

    class ThinkingVideoTemplate(VideoTemplate):
        thinking: ClassVar[bool] = True

    stock = template.TEMPLATES["qwen3_vl"]
    plugin = template.get_mm_plugin(name=TEMPLATE, image_token="<|image_pad|>", video_token="<|video_pad|>")
    for name, cls in ((TEMPLATE, VideoTemplate), (THINKING_TEMPLATE, ThinkingVideoTemplate)):
        if name not in template.TEMPLATES:
            template.register_template(
                name=name,
                format_user=stock.format_user,
                format_assistant=stock.format_assistant,
                format_system=stock.format_system,
                format_function=stock.format_function,
                format_observation=stock.format_observation,
                format_tools=stock.format_tools,
                stop_words=["<|im_end|>"],
                replace_eos=True,
                mm_plugin=plugin,
                template_class=cls,
            )


def extend_collator(collator: ModuleType) -> None:
    """Token types at the width of the padded batch: the stock collator pads them less far than input_ids."""
    stock = collator.SFTDataCollatorWith4DAttentionMask

    @dataclass
    class SFTDataCollatorWith4DAttentionMask(stock):
        def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
            if not is_ours(self.template):
                return super().__call__(features)
            # Frames are read here, once a batch is wanted: what asks for lengths alone decodes nothing.
            features = [feature["load"]() if "load" in feature else feature for feature in features]
            # Counted before stock shows a picture that no record has, where a batch is of texts alone.
            images, clips = (
                sum(len(feature.get(kind) or ()) for feature in features) for kind in ("images", "videos")
            )
            # A packed row has its samples numbered from 1 in its mask.
            lengths = [n for feature in features for n in np.bincount(feature["attention_mask"])[1:].tolist()]
            batch = super().__call__(features)
            batch["mm_token_type_ids"] = token_type_ids(batch["input_ids"], self.processor)
            grids = (batch.get(name) for name in ("image_grid_thw", "video_grid_thw"))
            grids = [grid for grid in grids if grid is not None]
            # The trainer takes it out. Plain numbers: counting them never waits for the device.
            batch["counts"] = {
                "images": images,
                "clips": clips,
                "lengths": lengths,
                "grids": [tuple(row) for grid in grids for row in grid.tolist()],
            }
            return batch

    replace_everywhere(collator, "SFTDataCollatorWith4DAttentionMask", SFTDataCollatorWith4DAttentionMask)


class FlatCollator:
    """Items of a data set, or packed rows of samples -> a flat micro-batch (`prompt.flat`).

    Args:
        table_side: rows and columns of the vision tower's table of position embeddings.
    """

    def __init__(self, processor: Any, table_side: int) -> None:
        self.processor, self.table_side = processor, table_side

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """What `lay_flat` makes."""
        reader = clip_reader_of(self.processor)
        samples, images, clips = [], [], []
        for feature in features:
            feature = feature["load"]() if "load" in feature else feature
            images += feature["images"] or ()
            clips += [_decode(video, reader) for video in feature["videos"] or ()]
            # A packed row has its samples numbered from 1 in its mask, and 0 where it was filled up.
            ids, labels, mask = (np.asarray(feature[name]) for name in ("input_ids", "labels", "attention_mask"))
            samples += [(ids[mask == number], labels[mask == number]) for number in range(1, mask.max() + 1)]
        return lay_flat(samples, images, clips, self.processor, reader.sampling, self.table_side)
