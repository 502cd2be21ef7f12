"""A recipe: the data that it names, and the keys that it gave."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..prompt.encoder import Encoder
from ..records.report import DatasetError
from ..records.table import Records
from ..train.run_record import plain, without_secrets
from .core import TEMPLATE, is_ours
from .items import make_encoder
from .rows import LAYOUT


@dataclass(frozen=True)
class RecipeData:
    """The data sets that a training recipe names, without its model's weights.

    Attributes:
        parts: their records by data set, but for those that are wrong.
        wrong: how many these are.
        unread: data sets of which nothing could be read.
        encoder: of the records.
        most_wrong: the greatest share of a data set that training may leave out.
        files: the annotation file or folder of each data set that has one here.
    """

    parts: dict[str, Records]
    wrong: int
    unread: list[str]
    encoder: Encoder
    most_wrong: float
    files: dict[str, Path]


def recipe_data(recipe: Path, overrides: list[str]) -> RecipeData:
    """What a recipe trains on; wrong records are printed.

    Args:
        overrides: `key=value`, as for `llamafactory-cli`.
    """
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.data.loader import _load_single_dataset
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.hparams import get_train_args, read_args
    from llamafactory.model import load_tokenizer

    sys.argv = ["lmf-video", str(recipe), *overrides]
    # What needs a GPU or several processes has no part in the data.
    args = {**read_args(), "deepspeed": None, "bf16": False, "fp16": False, "use_cpu": True, "streaming": False}
    args["overwrite_output_dir"] = True  # nothing is trained, so a folder that holds a run does not matter
    model_args, data_args, training_args, _, _ = get_train_args(args)
    if not is_ours(data_args.template):
        raise ValueError(f"{recipe} has template {data_args.template}; only {TEMPLATE} can be checked")
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    names = [*(data_args.dataset or ()), *(data_args.eval_dataset or ())]
    parts, wrong, unread, files = {}, 0, [], {}
    for name, attr in zip(names, get_dataset_list(names, data_args.dataset_dir), strict=True):
        if attr.load_from == "file":
            files[name] = Path(data_args.dataset_dir, attr.dataset_name)
        try:
            parts[name] = Records(_load_single_dataset(attr, model_args, data_args, training_args), LAYOUT)
        except DatasetError as error:
            wrong += error.wrong
            print(error)
            left = copy(data_args)
            left.skip_wrong_records, left.skip_wrong_share = True, 1.0
            try:  # the clips of the other records are to be checked all the same
                parts[name] = Records(_load_single_dataset(attr, model_args, left, training_args), LAYOUT)
            except DatasetError:
                unread.append(name)
    encoder = make_encoder(template, module["tokenizer"], module["processor"], data_args)
    return RecipeData(parts, wrong, unread, encoder, data_args.most_wrong, files)


# Made by a run for itself; what is known of them is in `history`, and where a run is started again in its command.
_NO_RECIPE = ("resume_from_checkpoint", "local_rank")


def _as_given(field: dataclasses.Field, value: Any) -> Any:
    """A parsed value as a recipe gives it: lists that LLaMA-Factory made of a text are that text again."""
    value = plain(value)
    if field.name == "report_to":
        return value or "none"
    if field.name in ("fsdp", "debug"):
        return " ".join(value) if isinstance(value, list) else value
    if isinstance(value, list) and "list" not in str(field.type).lower():
        return ",".join(map(str, value))
    return value


def resolved_recipe(arguments: Sequence[Any]) -> dict[str, Any]:
    """The keys and values, as in a recipe, that differ from LLaMA-Factory's and transformers' defaults.

    Parsed again by `get_train_args` they give the same. Secrets are written as "(given)".

    Args:
        arguments: as `get_train_args` returns them: model, data, training, fine-tuning, generating.
    """
    model_args, data_args, training_args, finetuning_args = arguments[:4]
    recipe = {}
    for parsed in arguments:
        for field in dataclasses.fields(parsed):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            value = _as_given(field, getattr(parsed, field.name))
            if field.init and field.name not in _NO_RECIPE and (value or None) != (_as_given(field, default) or None):
                recipe[field.name] = value
    # What parsing fills in of itself from other keys, or turns round.
    filled = {
        "media_dir": data_args.dataset_dir,
        "packing": finetuning_args.stage == "pt",
        "label_names": ["labels"],
        "generation_max_length": data_args.cutoff_len,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not training_args.use_cpu,
        "fsdp_config": {"min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False},
    }
    for key, value in filled.items():
        if key in recipe and recipe[key] == value:
            del recipe[key]
    if finetuning_args.finetuning_type != "lora":
        recipe.pop("lora_alpha", None)
    given = getattr(model_args, "given_video_keys", None)
    if given is not None:
        for key in [k for k in recipe if re.match("(video|image)_(fps|maxlen|min_pixels|max_pixels)$", k)]:
            if key not in given or (key == "video_maxlen" and "video_max_frames" in recipe):
                del recipe[key]
    if data_args.packing:
        recipe["cutoff_len"] = data_args.cutoff_len + 1  # LLaMA-Factory takes one off
    return without_secrets(recipe)
