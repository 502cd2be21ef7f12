"""Layers compiled for flat micro-batches, what the log says of it, and Liger's kernels where nothing is compiled."""

import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch._dynamo.callback import callback_handler
from torch._dynamo.utils import counters
from transformers import TrainerCallback

# Else a program is good only for as many tokens as the first micro-batch shows to be many, or few.
_OPTIONS = {"triton.mix_order_reduction_non_strict_mode": True}


def compile_layers(model: torch.nn.Module) -> None:
    """Compile each layer of the language model and block of the vision tower, once for all lengths, for a GPU.

    Args:
        model: a Qwen3VLModel, after `run_flat`.
    """
    # What the backward pass writes out anyway need not be kept: a third of the activations, computed again in passing.
    torch._functorch.config.ban_recompute_materialized_backward = False
    torch._dynamo.config.specialize_float = True  # else scales and epsilons are tensors on the CPU, with kernels there
    for layer in (*model.language_model.layers, *model.visual.blocks):
        layer.compile(dynamic=True, options=_OPTIONS)


def use_liger(model: torch.nn.Module) -> bool:
    """Let Liger's kernels do the normalisation and the rotation of layers that are not compiled.

    Args:
        model: a Qwen3VLModel on a GPU, before `run_flat`.

    Returns:
        Whether the package liger-kernel is there and knows the model.
    """
    if find_spec("liger_kernel") is None:
        return False
    kernels = import_module("liger_kernel.transformers")
    apply = getattr(kernels, f"apply_liger_kernel_to_{model.config.model_type}", None)
    if apply is None:
        return False
    # The loss is our own, and needs the logits.
    apply(rope=True, rms_norm=True, swiglu=False, fused_linear_cross_entropy=False, model=model)
    return True


class CompileWatch(TrainerCallback):
    """Tells once how long compiling took, and once that something was compiled after the first step.

    Args:
        log: takes a line for the person who runs this.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log, self._told = log, 0
        self._began, self._seconds = 0.0, 0.0
        self._before = _counts()

    def _begin(self, _: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, _: Any) -> None:
        self._seconds += time.perf_counter() - self._began

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        callback_handler.register_start_callback(self._begin)
        callback_handler.register_end_callback(self._end)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        callback_handler.remove_start_callback(self._begin)
        callback_handler.remove_end_callback(self._end)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = _counts()
        programs, cached = (after - before for after, before in zip(now, self._before, strict=True))
        if programs and self._told < 2:
            took = f"took {self._seconds:.1f} s: {programs} programs, {cached} of them from its cache on disk"
            self._log(
                f"torch.compile {took}."
                if not self._told
                else f"By step {state.global_step}, torch.compile was needed again and {took}. Later ones are not told; "
                "TORCH_LOGS=recompiles tells them all, with reasons. `compile_layers: false` trains without."
            )
            self._told += 1
        self._before, self._seconds = now, 0.0


def _counts() -> tuple[int, int]:
    """Programs that this process has made, and how many of them came from the cache on disk."""
    return counters["stats"]["unique_graphs"], counters["aot_autograd"]["autograd_cache_hit"]
