"""Gradient checkpointing of as few layers as memory needs: which keep their activations, and which compute them again."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

PARTS = ("language_model", "vision_tower")
_SHARE = 0.85  # of what micro-batches may take; the rest splits into blocks that are too small


def let_segments_grow() -> None:
    """Keep what batches of many lengths leave free in one piece, unless PYTORCH_CUDA_ALLOC_CONF says how it is kept."""
    given = any(name in os.environ for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    if torch.cuda.is_available() and not given:
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def layers_of(model: torch.nn.Module) -> dict[str, Sequence[torch.nn.Module]]:
    """The layers of a Qwen3VLModel by part."""
    return {"language_model": model.language_model.layers, "vision_tower": model.visual.blocks}


def checkpoint_parts(model: torch.nn.Module, parts: Sequence[str]) -> None:
    """Leave gradient checkpointing, where it is on, in these parts alone, and of these in those that are trained."""
    for part, layers in layers_of(model).items():
        learns = part == "language_model" or any(p.requires_grad for p in model.visual.parameters())
        for layer in layers:
            layer.gradient_checkpointing &= part in parts and learns


def checkpoint_frozen_layers(model: torch.nn.Module) -> None:
    """Let layers of a frozen language model compute again too, where gradients pass through them to what they are given.

    LLaMA-Factory leaves layers without trained weights out, so these would keep their activations under any policy.
    """
    before = (model.visual, model.get_input_embeddings())
    passes = any(p.requires_grad for part in before for p in part.parameters())
    for layer in model.language_model.layers:
        if passes and layer.gradient_checkpointing and not any(p.requires_grad for p in layer.parameters()):
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


def kept_layers(room: float, costs: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, int]:
    """How many layers of each part keep their activations.

    Args:
        room: bytes that there are for it.
        costs: bytes that one more layer of a part takes, in the order in which parts are served.
        counts: layers of each part.
    """
    kept = {}
    for part, cost in costs.items():
        fits = counts[part] if cost <= 0 else int(max(room, 0) // cost)
        kept[part] = min(counts[part], fits)
        room -= kept[part] * cost
    return kept


@dataclass
class Figures:
    """What micro-batches of one kind, with clips and pictures or without, have taken while they were measured.

    Attributes:
        first: tokens and patches, and bytes beyond those at its start, of the largest that began a step; the gradients
            that it left are among them.
        later: the same of the largest that found the gradients there.
        costs: bytes a token or patch that a layer takes more which keeps its activations.
    """

    first: tuple[dict[str, int], int] | None = None
    later: tuple[dict[str, int], int] | None = None
    costs: dict[str, float] = field(default_factory=dict)


class Recomputation:
    """Chooses for each micro-batch, from what those of the first step have taken.

    While micro-batches are measured, all layers but the last of each part compute their activations again, and two
    figures are taken: what a layer that keeps them takes more than one that does not, and what a micro-batch takes in
    all. From the second step on, the weights, gradients and optimizer are there, and as many layers keep theirs as fit
    beside them. Clips that come after steps of texts alone are measured then.

    Args:
        model: a Qwen3VLModel after `run_flat`, on a GPU, with gradient checkpointing on; weights whole on this process.
        log: takes a line for the person who runs this, once it has chosen.
    """

    def __init__(self, model: torch.nn.Module, log: Callable[[str], None]) -> None:
        self._log: Callable[[str], None] | None = log
        self._layers = {
            part: [layer for layer in layers if layer.gradient_checkpointing]
            for part, layers in layers_of(model).items()
        }
        self._steps = self._micro_batches = 0  # begun; of this step
        self._states = self._gradients = 0  # bytes in use between steps, and of all gradients
        self._limit = 0.0
        self._figures: dict[bool, Figures] = {}
        self._start: int | None = None  # bytes, of the micro-batch that is measured
        self._seen: dict[str, list[int]] = {}

    @property
    def chooses(self) -> bool:
        """Whether there are layers that may compute their activations again."""
        return any(self._layers.values())

    def begin_step(self) -> None:
        """Note what is in use between steps; it grows once more where a step was passed over, as fp16's are."""
        self._steps += 1
        self._micro_batches = 0
        self._states = torch.cuda.memory_allocated()
        if self._steps == 2:
            free, _ = torch.cuda.mem_get_info()
            self._limit = free + torch.cuda.memory_reserved()  # less than `size` by other processes and CUDA itself

    def begin_micro_batch(self, tokens: int, flat: dict[str, Any]) -> None:
        """Choose for one; torch's peak of memory in use begins anew where it is measured.

        Args:
            tokens: of it.
            flat: its layout (`lay_flat`).
        """
        self._micro_batches += 1
        figures = self._figures.get(flat["visual_at"] is not None)
        if self._steps == 1 or figures is None:
            self._start = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self._seen = {part: [] for part in PARTS}
            flat["look"] = lambda part: self._seen[part].append(torch.cuda.memory_allocated())
            self._set(dict.fromkeys(PARTS, 1))
            return
        units = _units(tokens, flat)
        beside = (self._limit - self._states - self._gradients) * _SHARE
        room = beside - _scaled(figures.later or figures.first, units)
        if self._micro_batches == 1 and figures.first:
            room = max(room, (self._limit - self._states) * _SHARE - _scaled(figures.first, units))
        costs = {part: figures.costs[part] * units[part] for part in PARTS}
        counts = {part: len(layers) for part, layers in self._layers.items()}
        kept = kept_layers(room, costs, counts)
        self._set(kept)
        if self._log is not None:
            told = " and ".join(f"{kept[part]} of {counts[part]} in the {part}" for part in PARTS if counts[part])
            self._log(
                f"Gradient checkpointing: of the layers, {told} keep their activations in a micro-batch of {tokens} tokens; "
                "the others compute them again. It is chosen for each micro-batch, by what is free on the GPU."
            )
            self._log = None

    def end_micro_batch(self, tokens: int, flat: dict[str, Any]) -> None:
        """Take the figures of one that is measured."""
        if self._start is None:
            return
        units, taken = _units(tokens, flat), torch.cuda.max_memory_allocated() - self._start
        if self._steps == 1:
            self._gradients = torch.cuda.memory_allocated() - self._states
        figures = self._figures.setdefault(flat["visual_at"] is not None, Figures())
        name = "first" if self._micro_batches == 1 else "later"
        known = getattr(figures, name)
        if known is None or units["language_model"] > known[0]["language_model"]:
            setattr(figures, name, (units, taken))
            # The last layer keeps its activations, the one before does not.
            figures.costs = {
                part: (seen[-1] - 2 * seen[-2] + seen[-3]) / units[part] if len(seen) > 2 else 0.0
                for part, seen in self._seen.items()
            }
        self._start = None

    def _set(self, kept: Mapping[str, int]) -> None:
        for part, layers in self._layers.items():
            for number, layer in enumerate(layers):
                layer.gradient_checkpointing = number < len(layers) - kept[part]


def _units(tokens: int, flat: dict[str, Any]) -> dict[str, int]:
    return {"language_model": tokens, "vision_tower": len(flat["patches"])}


def _scaled(measured: tuple[dict[str, int], int], units: dict[str, int]) -> float:
    """Bytes of a micro-batch of other size than the measured one; no fewer for a smaller one."""
    of, taken = measured
    return taken * max(1.0, *(units[part] / of[part] for part in PARTS))
