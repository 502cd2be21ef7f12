"""`lmf-video eval --export-lmms`: held-out records as a task of lmms-eval, with the measures that `eval` takes of them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..evaluate.measures import judge
from ..media import ASSISTANT, Conversation, laid_out
from ..records.json_text import json_text
from ..records.question import Asked

_FUNCTIONS = '''"""The task's functions; they need llamafactory-video."""

import functools
import json
import re

import numpy as np
from llamafactory_video.evaluate.measures import judge


def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    """Turns with clips and pictures where they are shown; other models than ours read no `settings`."""
    return json.loads(doc["messages"])


def doc_to_visual(doc):
    return [item["url"] for turn in doc_to_messages(doc) for item in turn["content"] if item["type"] != "text"]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return "\\n".join(item["text"] for turn in doc_to_messages(doc) for item in turn["content"] if item["type"] == "text")


def doc_to_target(doc):
    return doc["label"]


def process_results(doc, results):
    return {name: (json.loads(doc["label"]), results[0]) for name in MEASURES}


def _figure(name, pairs):
    """A measure over all records, as `lmf-video eval` has it."""
    scored = judge([label for label, _ in pairs], [answer for _, answer in pairs])
    return float(scored.figures[name].values(np.ones((1, len(pairs))))[0])


'''


def export_task(asked: Sequence[Asked], folder: Path, max_new_tokens: int) -> None:
    """Write a task's folder, for `lmms-eval --include_path`.

    Args:
        asked: records with right answers; those that are wrong are an error.

    Raises:
        ValueError: naming a record that cannot be asked.
    """
    rows = []
    for each in asked:
        if not isinstance(each.conversation, Conversation):
            raise ValueError(f"{each.source}: {each.conversation}")
        rows.append(
            {
                "id": each.source,
                "messages": json.dumps(_messages(each.conversation), ensure_ascii=False),
                "label": json_text(each.label),
            }
        )
    name = re.sub(r"\W", "_", folder.name)
    figures = judge(
        [each.label for each in asked],
        [json_text(each.label) if not isinstance(each.label, str) else each.label for each in asked],
    ).figures
    names = {re.sub(r"\W", "_", figure): figure for figure in figures}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    lines = [f"figure_{measure} = functools.partial(_figure, {figure!r})" for measure, figure in names.items()]
    (folder / "utils.py").write_text(
        _FUNCTIONS + f"MEASURES = {list(names)!r}\n" + "\n".join(lines) + "\n", encoding="utf-8"
    )
    functions = ("doc_to_messages", "doc_to_visual", "doc_to_text", "doc_to_target", "process_results")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / "test.jsonl").resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        **{function: _Function(f"utils.{function}") for function in functions},
        "generation_kwargs": {"max_new_tokens": max_new_tokens, "do_sample": False, "temperature": 0},
        "metric_list": [
            {
                "metric": measure,
                "aggregation": _Function(f"utils.figure_{measure}"),
                "higher_is_better": not figures[figure].lower_is_better,
            }
            for measure, figure in names.items()
        ],
        "metadata": [{"version": 0.0}],
    }
    text = yaml.dump(task, Dumper=_Dumper, allow_unicode=True, sort_keys=False)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    print(
        f"{folder}: {len(rows)} records as the task {name}. With lmms-eval:\n  lmms-eval eval --model llamafactory_video --model_args "
        f"pretrained=FOLDER --tasks {name} --include_path {folder}"
    )


def _messages(question: Conversation) -> list[dict[str, Any]]:
    """The turns before the last answer, as lmms-eval has them."""
    clips, images = iter(question.videos), iter(question.images)
    system = [{"type": "text", "text": question.system}]
    messages = [{"role": "system", "content": system}] if question.system else []
    for role, text in question.messages[:-1]:
        items = [_item(kind, shown) for kind, shown in laid_out(text, clips, images)]
        messages.append({"role": "assistant" if role == ASSISTANT else "user", "content": items})
    return messages


def _item(kind: str, shown: Any) -> dict[str, Any]:
    if kind == "text":
        return {"type": "text", "text": shown}
    if kind == "image":
        return {"type": "image", "url": str(Path(shown).resolve())}
    if shown.frames:
        raise ValueError(f"{shown}: lists of frames have no place in lmms-eval; make a video file of them")
    settings = {key: value for key, value in shown.settings.items() if value is not None}
    ends = {"start_time": shown.start, "end_time": shown.end, "settings": settings or None}
    ends = {key: value for key, value in ends.items() if value is not None}
    return {"type": "video", "url": str(Path(shown.path).resolve()), **ends}


class _Function(str):
    """A function that a task's YAML names."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))
