"""A model made ready for flat micro-batches: its forward pass, compiled layers, and which layers compute twice."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from ..families import family_of
from .flat import compile_layers, run_flat
from .recompute import PARTS, Recomputation, checkpoint_parts, let_segments_grow

_LONG_RUN = 100  # steps after which compiling the layers has paid


def set_up_layers(
    model: torch.nn.Module,
    args: Any,
    is_flat: bool,
    spreads: bool,
    compiled: bool | None,
    checkpointing_policy: str,
    dataset: Any,
    log: Callable[[str], None],
) -> Recomputation | None:
    """Prepare a model's layers.

    Args:
        args: transformers' TrainingArguments.
        is_flat: samples of a micro-batch lie end to end.
        spreads: layers gather their weights from other processes whenever they are called (ZeRO-3, FSDP).
        compiled, checkpointing_policy: see `VideoTrainer`.
        dataset: that is trained on.
        log: takes a line for the person who runs this.

    Returns:
        What chooses for each micro-batch which layers compute their activations again, if something does.
    """
    on_gpu = args.device.type == "cuda"
    if compiled is None:
        pays = on_gpu and not spreads and _steps(args, dataset) >= _LONG_RUN and not args.torch_compile
        compiled = pays and not getattr(model, "is_quantized", False) and _has_compiler(log)
    core = family_of(model.config).core
    recomputation = None
    for module in [module for module in model.modules() if type(module).__name__ == core]:
        run_flat(module)
        checkpoint_parts(module, {"none": (), "language_model": ("language_model",)}.get(checkpointing_policy, PARTS))
        if is_flat and compiled:
            compile_layers(module)
        if is_flat and on_gpu and not spreads and checkpointing_policy == "auto":
            let_segments_grow()
            recomputation = Recomputation(module, log)
    return recomputation if recomputation is not None and recomputation.chooses else None


def _steps(args: Any, dataset: Any) -> float:
    """How many steps a run has, as far as is known before it."""
    if args.max_steps > 0 or not hasattr(dataset, "__len__"):
        return args.max_steps
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return len(dataset) * args.num_train_epochs / batch


def _has_compiler(log: Callable[[str], None]) -> bool:
    if any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return True
    log("Layers are not compiled, since there is no C compiler (gcc); a step takes a third longer.")
    return False
