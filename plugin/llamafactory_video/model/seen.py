"""What the vision tower made of clips and pictures, kept: however many questions and turns, each is looked at once."""

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from ..prompt.flat import lay_vision
from ..prompt.pixels import read_image
from ..video.reader import DecodedClip
from ..video.sampling import Sampling

_KEPT = 1 << 29  # bytes that stay on the device between questions


@dataclass(frozen=True)
class _Features:
    """Of one clip or picture: its grid in patches, (t, h, w), and its tokens, (tokens, hidden), for each layer that gets some."""

    grid: tuple[int, int, int]
    layers: tuple[torch.Tensor, ...]

    @property
    def size(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


class SeenMedia:
    """The vision tower of a model with a memory.

    Args:
        base: transformers' Qwen3VLModel or Qwen3VLMoeModel, made ready by `run_flat`.
        processor: the model's.
        sampling: of pictures.
    """

    def __init__(self, base: torch.nn.Module, processor: Any, sampling: Sampling) -> None:
        self._base, self._processor, self._sampling = base, processor, sampling
        self._side = math.isqrt(base.config.vision_config.num_position_embeddings)
        self._kept: dict[str, _Features] = {}  # what was asked for last stands last

    @contextlib.contextmanager
    def shown(self, images: Sequence[Any], clips: Sequence[DecodedClip]) -> Iterator[dict[str, torch.Tensor]]:
        """Let the model have the features of these clips and pictures, in order of their tokens.

        Yields:
            What transformers' model is to be given in place of pixels.
        """
        pictures = [read_image(image, self._sampling) for image in images]
        features = self._look(pictures, clips)
        parts = {"image": features[: len(pictures)], "video": features[len(pictures) :]}
        given = {}
        for kind, found in parts.items():
            if found:
                setattr(self._base, f"get_{kind}_features", self._as_output(found))
                given[f"{kind}_grid_thw"] = torch.tensor([each.grid for each in found], device=self._base.device)
                given["pixel_values" if kind == "image" else "pixel_values_videos"] = torch.empty(0)
        try:
            yield given
        finally:
            for kind, found in parts.items():
                if found:
                    delattr(self._base, f"get_{kind}_features")

    def _as_output(self, found: Sequence[_Features]) -> Any:
        """What transformers' `get_image_features` and `get_video_features` give."""
        outputs = sys.modules[type(self._base).__module__].BaseModelOutputWithDeepstackFeatures
        embeddings, *deepstack = zip(*(each.layers for each in found), strict=True)
        output = outputs(pooler_output=embeddings, deepstack_features=[torch.cat(layer) for layer in deepstack])
        return lambda *args, **kwargs: output

    def _look(self, pictures: Sequence[Any], clips: Sequence[DecodedClip]) -> list[_Features]:
        """The features of pictures and clips; those that are not known are looked at in one call."""
        contents = [np.asarray(picture) for picture in pictures] + [clip.frames for clip in clips]
        keys = [f"{array.shape}{xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).data)}" for array in contents]
        unknown = {key: number for number, key in reversed([*enumerate(keys)]) if key not in self._kept}
        numbers = sorted(unknown.values())
        if numbers:
            new_pictures = [pictures[i] for i in numbers if i < len(pictures)]
            new_clips = [clips[i - len(pictures)] for i in numbers if i >= len(pictures)]
            layout, *grids = lay_vision(new_pictures, new_clips, self._processor, self._sampling, self._side)
            with torch.inference_mode():
                seen = self._base.visual(flat=_to_device(layout, self._base.device))
            merge = self._processor.video_processor.merge_size
            grids = [tuple(grid) for part in grids for grid in part]
            counts = [math.prod(grid) // merge**2 for grid in grids]
            layers = [layer.split(counts) for layer in (seen.pooler_output, *seen.deepstack_features)]
            for number, grid, *of_layers in zip(numbers, grids, *layers, strict=True):
                self._kept[keys[number]] = _Features(grid, tuple(layer.clone() for layer in of_layers))
        for key in keys:
            self._kept[key] = self._kept.pop(key)
        features = [self._kept[key] for key in keys]
        size = sum(each.size for each in self._kept.values())
        for key in list(self._kept):
            if size <= _KEPT:
                break
            size -= self._kept.pop(key).size
        return features


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to_device(each, device) for each in value)
    if isinstance(value, dict):
        return {key: _to_device(each, device) for key, each in value.items()}
    return value
