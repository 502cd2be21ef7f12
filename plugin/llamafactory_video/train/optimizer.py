"""Learning rates by module, whichever optimizer LLaMA-Factory is asked for.

The projector is what has "merger" in its name (`visual.merger` and the three `visual.deepstack_merger_list`), the
vision tower what else has "visual", the language model all the rest: the parameter groups of Qwen's official trainer,
where, unlike there, each rate works without the other.

The optimizer is made as without us; then its groups are split by module, each part with its own rate. So whatever an
optimizer keeps in its groups (LoRA+'s ratio, GaLore's rank) stays.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers import Trainer

from ..families import MODULES, module_of
from .rounding import bounds_by_module, check_rounding

RATE_KEYS = {"vision_tower": "vision_tower_lr", "mm_projector": "mm_projector_lr"}
FREEZE_KEYS = {"vision_tower": "freeze_vision_tower", "mm_projector": "freeze_multi_modal_projector"}
# Optimizers whose groups cannot be split, by their package.
UNSPLITTABLE = {
    "lomo_optim": "LOMO and AdaLOMO step during the backward pass, all parameters at one rate",
    "badam": "BAdam makes its groups anew whenever it changes the block that trains",
    "grokadamw": "in GrokAdamW a tensor's momentum depends on its place within its group",
}


class GroupRow(NamedTuple):
    """One line of `group_rows`: the trainable parameters that share a module, a rate and a weight decay."""

    module: str
    parameters: int
    tensors: int
    learning_rate: float
    weight_decay: float
    dtypes: str


def given_rates(finetuning_args: Any) -> dict[str, float]:
    """The learning rates that a recipe gives for modules."""
    rates = {module: getattr(finetuning_args, key, None) for module, key in RATE_KEYS.items()}
    return {module: rate for module, rate in rates.items() if rate is not None}


def make_optimizer(
    stock: Callable, model: torch.nn.Module, training_args: Any, finetuning_args: Any, log: Callable[[str], None]
) -> torch.optim.Optimizer | None:
    """The optimizer that LLaMA-Factory and transformers would make, its groups split by module.

    Args:
        stock: LLaMA-Factory's create_custom_optimizer; it returns None where it leaves the choice to transformers.
        log: takes the table of the groups.

    Raises:
        ValueError: if a module's rate is asked for and cannot be given, or if weights of a low precision would not
            move at their rate.
    """
    rates = given_rates(finetuning_args)
    named = list(model.named_parameters())
    if rates:
        check_rates(rates, training_args.learning_rate)
        if training_args.optim in ("lomo", "adalomo"):  # before its package is asked for
            raise ValueError(
                f"{_keys(rates)} cannot work with optim {training_args.optim}: {UNSPLITTABLE['lomo_optim']}"
            )
        check_deepspeed(training_args.deepspeed, finetuning_args)
        check_trained(rates, named, finetuning_args)
    _round_stochastically(training_args, named)
    optimizer = stock(model, training_args, finetuning_args) or _transformers_optimizer(model, training_args)
    if reason := _why_unsplittable(optimizer, named):
        if rates:
            raise ValueError(
                f"{_keys(rates)} cannot work with this optimizer ({type(optimizer).__name__}): {reason}. Choose "
                "another, such as `optim: adamw_torch`, or remove these keys"
            )
        return optimizer
    split_groups(optimizer, named, Trainer.get_decay_parameter_names(None, model), rates, training_args.learning_rate)
    check_groups(named, optimizer)
    if not training_args.deepspeed_plugin:  # DeepSpeed steps a copy in float32
        check_rounding(optimizer)
    if rates:
        bounds_by_module(training_args, optimizer)
    log(f"Optimizer groups ({type(optimizer).__name__}):\n{group_table(group_rows(optimizer), named)}")
    return optimizer


def _keys(rates: Iterable[str]) -> str:
    return " and ".join(RATE_KEYS[module] for module in rates)


def check_rates(rates: dict[str, float], learning_rate: float) -> None:
    """Raise ValueError for rates that cannot be applied."""
    for module, rate in rates.items():
        if rate < 0:
            raise ValueError(f"{RATE_KEYS[module]} is {rate:g}; a learning rate is 0 or above")
    if learning_rate == 0:
        raise ValueError(
            f"learning_rate is 0 and {_keys(rates)} is given: an optimizer's own ratios and a scheduler's floor are "
            "relative to learning_rate, so it must be above 0. To hold the language model still, use "
            "`freeze_language_model: true`"
        )


def check_deepspeed(deepspeed: dict[str, Any] | str | None, finetuning_args: Any) -> None:
    """Raise ValueError if a module's rate is asked for and DeepSpeed would make the optimizer or the scheduler.

    Args:
        deepspeed: the DeepSpeed config or its file, as in `TrainingArguments.deepspeed`.
    """
    keys = [key for key in RATE_KEYS.values() if getattr(finetuning_args, key, None) is not None]
    if not deepspeed or not keys:
        return
    config = deepspeed if isinstance(deepspeed, dict) else json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    sections = [section for section in ("optimizer", "scheduler") if section in config]
    if sections:
        raise ValueError(
            f"the DeepSpeed config has a section {' and a section '.join(sections)}, with which DeepSpeed trains all "
            f"modules at one rate, but {' and '.join(keys)} is given. Remove that section: `optim`, "
            "`lr_scheduler_type` and the other keys of the recipe say the same"
        )


def check_trained(
    rates: Iterable[str], named_parameters: Iterable[tuple[str, torch.nn.Parameter]], finetuning_args: Any
) -> None:
    """Raise ValueError if a module has a rate but no parameter that trains; it names the key that frees it."""
    named = list(named_parameters)
    for module in rates:
        if any(p.requires_grad for name, p in named if module_of(name) == module):
            continue
        kind = finetuning_args.finetuning_type
        if all(module_of(name) != module for name, _ in named):
            cure = "the model has none"
        elif getattr(finetuning_args, FREEZE_KEYS[module]):
            cure = f"`{FREEZE_KEYS[module]}: false` frees it"
            if kind == "lora" and module == "mm_projector" and finetuning_args.freeze_vision_tower:
                cure += ", with `lora_target: linear_fc1,linear_fc2` and what else shall train"
        elif kind == "lora":
            cure = (
                f"lora_target ({', '.join(finetuning_args.lora_target)}) has none of its layers; "
                "`lora_target: all` with `freeze_vision_tower: false` has, and so have the names linear_fc1,linear_fc2"
            )
        else:
            cure = (
                f"`finetuning_type: {kind}` with freeze_trainable_layers {finetuning_args.freeze_trainable_layers} "
                "trains none of its blocks, which are numbered as the language model's; use `finetuning_type: full` "
                "or lora, or other layers"
            )
        raise ValueError(f"{RATE_KEYS[module]} is given, but no parameter of the {module} trains: {cure}")


def _round_stochastically(training_args: Any, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """torchao's optimizers can round bfloat16 weights at random, so that small steps add up; but only when told."""
    options = training_args.optim_args or ""
    if (
        training_args.optim in ("adamw_torch_8bit", "adamw_torch_4bit")
        and "bf16_stochastic_round" not in options
        and any(p.requires_grad and p.dtype == torch.bfloat16 for _, p in named_parameters)
    ):
        training_args.optim_args = ",".join(filter(None, [options, "bf16_stochastic_round=True"]))


def _transformers_optimizer(model: torch.nn.Module, training_args: Any) -> torch.optim.Optimizer:
    """What `Trainer.create_optimizer` makes, without a Trainer."""
    trainer = SimpleNamespace(
        optimizer=None,
        model=model,
        args=training_args,
        optimizer_cls_and_kwargs=None,
        get_decay_parameter_names=partial(Trainer.get_decay_parameter_names, None),
        get_optimizer_cls_and_kwargs=Trainer.get_optimizer_cls_and_kwargs,
    )
    return Trainer.create_optimizer(trainer)


def _why_unsplittable(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> str | None:
    """Why the groups of an optimizer cannot be split by module, or None."""
    named = list(named_parameters)
    package = type(optimizer).__module__.partition(".")[0]
    if package in UNSPLITTABLE:
        return UNSPLITTABLE[package]
    if getattr(optimizer, "optimizer_dict", None) is not None:
        return "layer-wise GaLore and APOLLO have one optimizer for each tensor, not groups"
    if any(group["lr"] is None or group.get("relative_step") for group in optimizer.param_groups):
        return "Adafactor with relative_step finds its rates itself"
    if any(name.endswith("_flat_param") and p.requires_grad for name, p in named):
        return "FSDP has put tensors of several modules into one; `fsdp_use_orig_params: true` keeps them apart"
    known = {id(p) for _, p in named}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        return "its groups hold tensors that are not the model's"
    return None


def split_groups(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    decay_names: Iterable[str],
    rates: dict[str, float],
    learning_rate: float,
) -> None:
    """Split the groups of an optimizer in place by module, and by whether weight decay is for them.

    A part is a copy of its group, with the group's rate times module rate / `learning_rate`, and two more keys:
    `module`, one of `MODULES`, and `name`, such as "vision_tower" or "vision_tower_no_decay", different for each
    part. A name that a group already has is kept (Adam-mini goes by it). Groups of the language model come first.

    Args:
        named_parameters: of the whole model.
        decay_names: parameters that may have weight decay; the others get none, nor do DoRA's magnitudes, which are
            norms.
        rates: learning rate by module; those that are missing have `learning_rate`.
        learning_rate: the one that the optimizer was made with.
    """
    names = {id(p): name for name, p in named_parameters}
    decaying = {name for name in decay_names if "lora_magnitude_vector" not in name}
    parts = []
    for group in optimizer.param_groups:
        params = defaultdict(list)
        for p in group["params"]:
            name = names[id(p)]
            params[module_of(name), name in decaying].append(p)
        for (module, decays), members in params.items():
            part = {**group, "params": members, "module": module}
            part.setdefault("name", module if decays else f"{module}_no_decay")
            for key in ("lr", "max_lr"):  # optimi's decay is relative to its max_lr
                if part.get(key) is not None:
                    part[key] = _scaled(part[key], rates.get(module, learning_rate), learning_rate)
            if not decays:
                part[_decay_key(part)] = 0.0
            parts.append(part)
    parts.sort(key=lambda part: MODULES.index(part["module"]))
    seen = Counter()
    for part in parts:
        seen[name := part["name"]] += 1
        if seen[name] > 1:
            part["name"] = f"{name}_{seen[name]}"
    optimizer.param_groups[:] = parts


def _decay_key(group: dict[str, Any]) -> str:
    return "wd" if "wd" in group else "weight_decay"  # LLaMA-Factory's Muon says wd


def _scaled(value: float | torch.Tensor, rate: float, learning_rate: float) -> float | torch.Tensor:
    """`value` x `rate` / `learning_rate`; of a tensor, a new one, as groups must not share theirs."""
    if rate == learning_rate:
        scaled = float(value)
    else:
        scaled = rate if value == learning_rate else float(value) * rate / learning_rate
    return torch.full_like(value, scaled) if isinstance(value, torch.Tensor) else scaled


def check_groups(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError, naming it, if a trainable tensor of the model is in no group or in more than one."""
    places = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    for name, p in named_parameters:
        if p.requires_grad and places[id(p)] != 1:
            raise ValueError(
                f"{name} trains and is in {places[id(p)]} groups of the optimizer ({type(optimizer).__name__}); every "
                "tensor that trains must be in one"
            )


def group_rows(optimizer: torch.optim.Optimizer, rate: str = "lr") -> list[GroupRow]:
    """The trainable parameters by module, rate and weight decay, in the order of the groups.

    Args:
        rate: the groups' key of it: "lr" is that of the next step, "initial_lr" the one that a scheduler starts from.
    """
    rows = defaultdict(list)
    for group in optimizer.param_groups:
        trained = [p for p in group["params"] if p.requires_grad]
        rows[group["module"], float(group.get(rate, group["lr"])), float(group.get(_decay_key(group), 0.0))] += trained
    return [
        # DeepSpeed ZeRO-3 leaves an empty parameter on each rank, with its whole size beside it.
        GroupRow(
            module,
            sum(getattr(p, "ds_numel", p.numel()) for p in params),
            len(params),
            rate,
            decay,
            ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in params})),
        )
        for (module, rate, decay), params in rows.items()
        if params
    ]


def group_table(rows: Iterable[GroupRow], named_parameters: Iterable[tuple[str, torch.nn.Parameter]] = ()) -> str:
    """Rows as aligned text under a header; numbers to the right. Below, how much of `named_parameters` is frozen."""
    header = tuple(field.replace("_", " ") for field in GroupRow._fields)
    cells = [header, *((m, f"{n:,}", f"{t:,}", f"{r:g}", f"{d:g}", kinds) for m, n, t, r, d, kinds in rows)]
    frozen: Counter[str] = Counter()
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            frozen[module_of(name)] += getattr(parameter, "ds_numel", parameter.numel())
    cells += [(module, f"{frozen[module]:,}", "", "frozen", "", "") for module in MODULES if frozen[module]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if 0 < i < 5 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(f"  {line}".rstrip() for line in lines)
