"""Recipes in LLaMA-Board: a recipe -> the fields of the page, and the recipe that the fields make."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from ..families import FAMILIES
from ..train.run_record import read_run_record
from .board_fields import FIELD_OF
from .core import TEMPLATE, THINKING_TEMPLATE, is_ours
from .known import read_recipe, shipped

CUSTOM = "Custom"  # LLaMA-Board's name for a model that it does not list
# Keys that LLaMA-Board sends with values of its own where a recipe does not give them.
_SENT = ("max_samples", "plot_loss", "include_num_input_tokens_seen")


def training_recipes() -> list[str]:
    """The recipes below recipes/ in this folder that train."""
    return [
        str(file) for file in sorted(Path("recipes").glob("*.yaml")) if "do_train: true" in file.read_text("utf-8")
    ]


def trained_folders(folder: Path, files: Sequence[str], depth: int = 1) -> list[Path]:
    """The folders of models or adapters below a folder, without their checkpoints.

    Args:
        files: any of which such a folder has.
        depth: how deep below it they may lie.
    """
    patterns = ("/".join(["*"] * levels) for levels in range(1, depth + 1))
    found = {file.parent for pattern in patterns for name in files for file in folder.glob(f"{pattern}/{name}")}
    return sorted(path for path in found if not path.name.startswith("checkpoint-"))


def recipe_for(template: str, finetuning_type: str) -> dict[str, Any]:
    """The values that a choice of template and kind of training fills in."""
    name = {"full": "wzry_full.yaml", "freeze": "wzry_frozen_vision.yaml"}.get(finetuning_type, "wzry_lora.yaml")
    return {**read_recipe(next(f for f in shipped("recipes") if f.name == name)), "template": template}


def defaults() -> dict[str, Any]:
    """What each key is where a training recipe does not give it."""
    from llamafactory.hparams import parser

    found: dict[str, Any] = {}
    for cls in reversed(parser._TRAIN_ARGS):
        for field in fields(cls):
            value = field.default if field.default_factory is MISSING else field.default_factory()
            found[field.name] = getattr(value, "value", value)  # of an enumeration
    # What the page has for None.
    return found | {
        "neftune_noise_alpha": 0,
        "loraplus_lr_ratio": 0,
        "rope_scaling": "none",
        "quantization_bit": "none",
    }


def cleaned(args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as they are run: without what is not given, but with every `false` that means something."""
    known = defaults()
    return {
        name: value
        for name, value in args.items()
        if value is not None and value != "" and not (value is False and known.get(name) is False)
    }


def recipe_text(args: Mapping[str, Any]) -> str:
    """The recipe that is run, as YAML."""
    return yaml.safe_dump(cleaned(args), allow_unicode=True, sort_keys=False)


def can_hold(component: Any, value: Any) -> Any:
    """A value as a component of gradio holds it; None if it cannot."""
    kind = type(component).__name__
    if kind == "Checkbox":
        return value if isinstance(value, bool) else None
    if kind == "Slider":
        whole = isinstance(value, int) and not isinstance(value, bool)
        part = isinstance(value, float) and not isinstance(component.step, int)
        return value if (whole or part) and component.minimum <= value <= component.maximum else None
    if kind == "Dropdown":
        known = component.allow_custom_value or str(value) in [choice for _, choice in component.choices]
        if component.multiselect:
            return value if isinstance(value, list) else [part.strip() for part in str(value).split(",")]
        return str(value) if known and isinstance(value, str | int) and not isinstance(value, bool) else None
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def fields_of(recipe: Mapping[str, Any], element: Callable[[str], Any], stages: Mapping[str, str]) -> dict[str, Any]:
    """The fields of the page, by element's id, with which it runs a recipe.

    A key that has no field, or whose field cannot hold its value, goes into the extra arguments, which stand over the fields.

    Args:
        element: the component of an id.
        stages: what the page calls each `stage`.
    """
    known, extra = defaults(), {}
    recipe = dict(recipe)
    # Several keys of a recipe make one field, or have places of their own on the page.
    precision = [name for name in ("pure_bf16", "bf16", "fp16") if recipe.pop(name, False)]
    found = {
        "top.model_path": recipe.pop("model_name_or_path", ""),
        "top.booster": "auto",
        "train.compute_type": precision[0] if precision else "fp32",
        "train.training_stage": next((name for name, s in stages.items() if s == recipe.get("stage", "sft")), None),
        "train.dataset": can_hold(element("train.dataset"), recipe.pop("dataset", None) or []),
        "train.output_dir": str(recipe.pop("output_dir", "")),
        "train.ds_stage": "none",
        "train.ds_offload": False,
    }
    adapter = recipe.pop("adapter_name_or_path", None)
    found["top.checkpoint_path"] = can_hold(element("top.checkpoint_path"), adapter) if adapter else []
    for name in ("stage", "do_train"):
        recipe.pop(name, None)
    for name, where in FIELD_OF.items():
        value = recipe.pop(name, known.get(name))
        held = can_hold(element(where), "" if value is None and type(element(where)).__name__ == "Textbox" else value)
        if held is not None:
            found[where] = held
        elif where not in found:
            extra[name] = value
    extra |= {name: known.get(name) for name in _SENT if name not in FIELD_OF}
    extra |= recipe
    found["train.extra_args"] = json.dumps(extra, ensure_ascii=False)
    return found


def template_of(model: str) -> str | None:
    """The template of ours for a model, by its folder or its name on the hub; None if there is none."""
    folder = Path(model)
    if folder.is_dir():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if config.get("model_type") not in FAMILIES:
            return None
        record = read_run_record(folder) or {}
        if is_ours(template := record.get("recipe", {}).get("template", "")):
            return template
    elif "qwen3-vl" not in model.lower():
        return None
    return THINKING_TEMPLATE if "thinking" in model.lower() else TEMPLATE
