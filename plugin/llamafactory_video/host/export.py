"""`llamafactory-cli export`: what it writes is whole: weights, processor, sampling, record of the run, and a card that says how to ask."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..train.model_card import write_export_card
from ..train.run_record import read_run_record, record_of_export, write_run_record
from .core import is_ours, replace_everywhere

# What goes to a hub: what an export writes, and nothing else that lies in its folder.
_PUSHED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "README.md")


def extend_tuner(tuner: ModuleType) -> None:
    """Exports of our templates have a record and a card, and are pushed whole, in one commit."""
    from llamafactory.hparams import get_infer_args, read_args

    stock = tuner.export_model

    def export_model(args: dict[str, Any] | None = None) -> None:
        args = read_args(args)
        if not isinstance(args, dict) or not is_ours(args.get("template")):
            stock(args)
            return
        model_args = get_infer_args(args)[0]
        hub = model_args.export_hub_model_id
        stock({**args, "export_hub_model_id": None})
        folder = Path(model_args.export_dir)
        _see_whole(folder)
        # An adapter tells how the model came about; a model without one, by its own record.
        sources = list(model_args.adapter_name_or_path or (model_args.model_name_or_path,))
        record = read_run_record(Path(sources[-1]))
        if record is not None:
            dtype = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype", "unknown")
            record = record_of_export(record, sources, dtype)
            write_run_record(folder, record)
        write_export_card(folder, record, model_args.model_name_or_path, sources, hub)
        (folder / "Modelfile").unlink(missing_ok=True)  # Ollama's, which knows neither clips nor this model
        if hub:
            push(folder, hub, model_args.hf_hub_token, tuner.logger.info_rank0)

    replace_everywhere(tuner, "export_model", export_model)


def _see_whole(folder: Path) -> None:
    """LLaMA-Factory goes on where tokenizer and processor cannot be saved.

    Raises:
        ValueError: naming what is missing.
    """
    wanted = ("config.json", "tokenizer.json", "processor_config.json", "video_sampling.json")
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} was not exported whole: {', '.join(missing)} could not be written; see the log above"
        )


def push(folder: Path, name: str, token: str | None, log: Callable[[str], None]) -> None:
    """Push a folder to a hub, in one commit, so that a download never meets half of it.

    Raises:
        ValueError: with the hub's reason.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    try:
        api.create_repo(name, exist_ok=True)
        said = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=list(_PUSHED),
            commit_message="Export of llamafactory-video",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} is exported, but could not be pushed to {name}: {reason}") from error
    log(f"{folder} is pushed: {said.commit_url}")
