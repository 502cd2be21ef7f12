"""A model's processor and tokenizer, which sample as the caller and the model's folder say."""

import functools
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Qwen3VLProcessor
from transformers.utils import cached_file

from ..video.contract import FILE, Contract, agreed, difference, nearest, read_contract, write_contract
from ..video.dialects import image_bounds_of, resolve_sampling
from ..video.reader import ClipReader
from ..video.sampling import Sampling


def apply_to_processor(
    dialect: str | None,
    given: dict[str, Any],
    processor: Any,
    timestamps: str | None = None,
    trained: Contract | None = None,
) -> Contract:
    """Resolve the keys and, where the processor can hold them, write them into it.

    In the dialect `qwen_finetune` the settings live in the processor itself, so plain transformers samples from a folder
    that it is saved in as training did.

    Args:
        trained: how the model was, if its folder tells.

    Returns:
        How clips and images are sampled.
    """
    video_processor, image_processor = processor.video_processor, processor.image_processor
    sampling = resolve_sampling(dialect, given, video_processor, timestamps, trained and trained.clips)
    size = image_processor.size
    pixels = size.shortest_edge, size.longest_edge
    if trained is not None and trained.clips.dialect == sampling.dialect:
        pixels = trained.image_pixels
    if sampling.dialect == "qwen_finetune":
        tell_processor(video_processor, sampling)
        pixels = image_bounds_of(given, pixels)
    image_processor.size = _bounded(size, *pixels)
    return Contract(sampling, pixels)


def tell_processor(video_processor: Any, sampling: Sampling) -> None:
    """Write a `qwen_finetune` sampling into transformers' video processor."""
    video_processor.fps = sampling.fps
    video_processor.min_frames, video_processor.max_frames = sampling.min_frames, sampling.max_frames
    video_processor.size = _bounded(video_processor.size, sampling.min_pixels, sampling.max_pixels)
    # A bound on each frame, which transformers from 5.16 on warns of and means to set by default.
    video_processor.cap_pixels_per_frame = False


def _bounded(size: Any, least: int, most: int) -> Any:
    return type(size)(shortest_edge=least, longest_edge=most)


def saved_file(name: str, file: str, **hub: Any) -> str | None:
    """A file beside a model or an adapter, in its folder or on the hub; None if there is none.

    Args:
        hub: `cache_dir`, `token`, `revision`, as transformers' `cached_file` takes them.
    """
    errors = ("gated_repo", "missing_entries", "connection_errors")
    return cached_file(name, file, **hub, **{f"_raise_exceptions_for_{error}": False for error in errors})


def trained_contract(
    model: str, adapters: Sequence[str], revision: str = "main", **hub: Any
) -> tuple[str, Contract] | None:
    """How the model was sampled when it was trained, and the folder that says so; an adapter's before its model's."""

    def find(name: str, **options: Any) -> list[tuple[str, Contract]]:
        file = saved_file(name, FILE, **options)
        return [] if file is None else [(name, read_contract(Path(file)))]

    found = [pair for name in adapters for pair in find(name, **hub)]
    return agreed(found or find(model, revision=revision, **hub))


class SamplingProcessor(Qwen3VLProcessor):
    """transformers' processor, which knows how clips are sampled, reads them so, and writes it where it is saved.

    A processor that was loaded becomes one by `prepare`.
    """

    contract: Contract
    _make_reader: Callable[[], ClipReader]
    _log: Callable[[str], None]
    _told = False  # what is lost on others: once is enough

    @classmethod
    def prepare(
        cls, processor: Any, contract: Contract, make_reader: Callable[[], ClipReader], log: Callable[[str], None]
    ) -> None:
        """Make transformers' processor one of ours.

        Args:
            make_reader: called when the first clip is read.
            log: takes a line for the person who runs this.
        """
        processor.__class__ = cls
        processor.contract, processor._make_reader, processor._log = contract, make_reader, log

    @functools.cached_property
    def clip_reader(self) -> ClipReader:
        """Plans and decodes clips as the contract says."""
        return self._make_reader()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Writes the contract too, and for plain transformers what comes nearest to it."""
        video_processor, clips = self.video_processor, self.contract.clips
        near = nearest(clips)
        if near != clips and not self._told:
            changed = difference(self.contract, Contract(near, self.contract.image_pixels))
            self._log(
                f"transformers without this plugin cannot sample exactly as {clips.dialect} does. For it, {save_directory} has "
                f"the nearest settings: {changed}"
            )
            self._told = True
        self.video_processor = copy(video_processor)
        tell_processor(self.video_processor, near)
        try:
            saved = super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.video_processor = video_processor
        write_contract(Path(save_directory), self.contract)
        return saved


SamplingProcessor.__name__ = Qwen3VLProcessor.__name__  # by which saved files name their class


def add_trained_tokens(tokenizer: Any, adapters: Sequence[str], log: Callable[[str], None], **hub: Any) -> bool:
    """Tokens that adapters were trained with and their model's tokenizer lacks, at the places that they had.

    Returns:
        Whether there are some, so that the model needs room for them.

    Raises:
        ValueError: if such a place is taken by another token.
    """
    grown = False
    for name in adapters:
        if saved_file(name, "tokenizer_config.json", **hub) is None:
            continue
        known, added = tokenizer.get_vocab(), []
        for number, token in sorted(AutoTokenizer.from_pretrained(name).added_tokens_decoder.items()):
            if token.content not in known:
                tokenizer.add_tokens([token], special_tokens=token.special)
                added.append(token.content)
            found = tokenizer.convert_tokens_to_ids(token.content)
            if found != number:
                raise ValueError(
                    f"{name} was trained with the token {token.content} at {number}, and here it is at {found}: its model "
                    "or another adapter has other tokens. Give the model that it was trained on"
                )
        if added:
            grown = True
            log(
                f"{name} was trained with {len(added)} more tokens than its model has: {', '.join(added)}. They are added."
            )
    return grown
