"""A model made ready for flat micro-batches: its forward pass, compiled layers, and which layers compute twice."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer

from ..families import family_of
from ..model.flat import run_flat
from .compiled import CompileWatch, compile_layers, use_liger
from .recompute import PARTS, Recomputation, checkpoint_frozen_layers, checkpoint_parts, let_segments_grow

_LONG_RUN = 100  # steps after which compiling the layers has paid


def set_up_layers(
    trainer: Trainer,
    is_flat: bool,
    spreads: bool,
    compiled: bool | None,
    checkpointing_policy: str,
    log: Callable[[str], None],
) -> Recomputation | None:
    """Prepare the layers of a trainer's model.

    Args:
        is_flat: samples of a micro-batch lie end to end.
        spreads: layers gather their weights from other processes whenever they are called (ZeRO-3, FSDP).
        compiled, checkpointing_policy: see `VideoTrainer`.
        log: takes a line for the person who runs this.

    Returns:
        What chooses for each micro-batch which layers compute their activations again, if something does.
    """
    model, args = trainer.model, trainer.args
    on_gpu = args.device.type == "cuda"
    if compiled is None:
        pays = on_gpu and not spreads and _steps(args, trainer.train_dataset) >= _LONG_RUN and not args.torch_compile
        compiled = pays and _compiles(model) and _has_compiler(log)
    compiled &= is_flat
    core = family_of(model.config).core
    recomputation = None
    for module in [module for module in model.modules() if type(module).__name__ == core]:
        if is_flat and on_gpu and not compiled and use_liger(module):
            log("Layers are not compiled; Liger's kernels do their normalisation and rotation.")
        run_flat(module)
        checkpoint_parts(module, {"none": (), "language_model": ("language_model",)}.get(checkpointing_policy, PARTS))
        checkpoint_frozen_layers(module)
        if compiled:
            compile_layers(module)
            trainer.add_callback(CompileWatch(log))
        if is_flat and on_gpu and not spreads and checkpointing_policy == "auto":
            let_segments_grow()
            recomputation = Recomputation(module, log)
    return recomputation if recomputation is not None and recomputation.chooses else None


def _compiles(model: torch.nn.Module) -> bool:
    """Whether layers with its kind of weights are known to compile: whole ones, and bitsandbytes' of 4 bits."""
    quantization = getattr(model.config, "quantization_config", None)
    return quantization is None or getattr(quantization, "load_in_4bit", False)


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
