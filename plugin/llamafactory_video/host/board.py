"""LLaMA-Board (`llamafactory-cli webui`) with fields for video, recipes, and errors that say what is wrong."""

import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..evaluate.report import Example, make_report, table
from .board_fields import FIELD_OF, FILLED, FREEZE_FIELDS, GROUP, IMAGE_FIELDS, STOCK_FIELDS, VIDEO_FIELDS, entered
from .board_page import extend_eval_tab, extend_infer_tab, extend_train_tab, filled
from .board_recipes import (
    CUSTOM,
    cleaned,
    fields_of,
    recipe_text,
    template_of,
    trained_folders,
    training_recipes,
)
from .core import is_ours, replace_everywhere
from .known import check_datasets, check_given, read_recipe

_LANGUAGES = ("en", "ru", "zh", "ko", "ja")
_SPEEDS = {"clips_per_second": "{:.3g} clips/s", "mfu": "MFU {:.1%}"}  # of a run's log


def extend_board(interface: ModuleType) -> None:
    """The page: called when all of its modules have been imported."""
    from llamafactory.extras.constants import DEFAULT_TEMPLATE, SUPPORTED_MODELS
    from llamafactory.webui import chatter, common, control, engine, locales, runner
    from llamafactory.webui.components import export, infer

    for name, paths in SUPPORTED_MODELS.items():
        if template := next(filter(None, map(template_of, paths.values())), None):
            DEFAULT_TEMPLATE[name] = template
    _add_words(locales.LOCALES)
    replace_everywhere(common, "_clean_cmd", cleaned)
    replace_everywhere(common, "save_cmd", _save_recipe)
    replace_everywhere(common, "gen_cmd", _show_recipe(common.gen_cmd))
    replace_everywhere(common, "get_template", _get_template(common))
    replace_everywhere(control, "list_config_paths", _list_config_paths(common.DEFAULT_CONFIG_DIR))
    replace_everywhere(control, "list_checkpoints", _list_checkpoints(control))
    replace_everywhere(control, "get_trainer_info", _telling_speed(control.get_trainer_info, control.TRAINER_LOG))
    replace_everywhere(common, "load_eval_results", _with_scores(common.load_eval_results))
    replace_everywhere(runner, "Runner", _runner(runner, common, SUPPORTED_MODELS))
    replace_everywhere(engine, "Engine", _engine(engine, common))
    replace_everywhere(chatter, "WebChatModel", _chatter(chatter))
    export.save_model = _reasons(export.save_model)
    is_multimodal = infer.is_multimodal
    infer.is_multimodal = lambda name: name == CUSTOM or is_multimodal(name)
    interface.create_train_tab = extend_train_tab(interface.create_train_tab)
    interface.create_eval_tab = extend_eval_tab(interface.create_eval_tab)
    interface.create_infer_tab = extend_infer_tab(interface.create_infer_tab)


# --- Words ---


def _add_words(locales: dict[str, Any]) -> None:
    def both(en: dict[str, str], zh: dict[str, str]) -> dict[str, dict[str, str]]:
        return {lang: zh if lang == "zh" else en for lang in _LANGUAGES}

    for name, field in VIDEO_FIELDS.items():
        en, zh = ({"label": label, "info": info} for label, info in (field.en, field.zh))
        locales[name] = both(en, zh)
    locales["video_tab"] = both({"label": GROUP["en"]}, {"label": GROUP["zh"]})


# --- The recipe that runs ---


def _recipe_file(args: dict[str, Any]) -> Path:
    from llamafactory.extras.constants import TRAINING_ARGS

    return Path(args["output_dir"], TRAINING_ARGS)


def _save_recipe(args: dict[str, Any]) -> str:
    file = _recipe_file(args)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(recipe_text(args), encoding="utf-8")
    return str(file)


def _show_recipe(stock: Callable) -> Callable:
    def gen_cmd(args: dict[str, Any]) -> str:
        if not is_ours(args.get("template")):
            return stock(args)
        return f"```bash\nllamafactory-cli train {_recipe_file(args)}\n```\n\n```yaml\n{recipe_text(args)}```"

    return gen_cmd


def _list_config_paths(folder: str) -> Callable:
    import gradio as gr

    def list_config_paths(current_time: str) -> Any:
        saved = (path.name for path in sorted(Path(folder).glob("*.yaml")))
        return gr.Dropdown(choices=[*dict.fromkeys((f"{current_time}.yaml", *saved, *training_recipes()))])

    return list_config_paths


def _list_checkpoints(control: ModuleType) -> Callable:
    import gradio as gr

    def list_checkpoints(model_name: str, finetuning_type: str) -> Any:
        """Those of runs from this page, by name, and what recipes have written, by path."""
        several = finetuning_type in control.PEFT_METHODS
        files = [name for name in control.CHECKPOINT_NAMES if name.startswith("adapter") == several]
        saved = trained_folders(Path(control.get_save_dir(model_name, finetuning_type)), files) if model_name else []
        choices = [*(path.name for path in saved), *map(str, trained_folders(Path("output"), files, depth=2))]
        return gr.Dropdown(value=[] if several else None, choices=choices, multiselect=several)

    return list_checkpoints


def _telling_speed(stock: Callable, log_name: str) -> Callable:
    import gradio as gr

    def get_trainer_info(lang: str, output_path: str, do_train: bool) -> tuple:
        text, progress, info = stock(lang, output_path, do_train)
        log = Path(output_path, log_name)
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        last = json.loads(lines[-1]) if lines else {}
        speeds = [form.format(last[name]) for name, form in _SPEEDS.items() if name in last]
        if speeds:
            steps = f"Running {last['current_steps']}/{last['total_steps']}"
            times = f"{last['elapsed_time']} < {last['remaining_time']}"
            label = " · ".join([f"{steps}: {times}", *speeds])
            progress = gr.Slider(label=label, value=last["percentage"], visible=True)
        return text, progress, info

    return get_trainer_info


def _runner(runner: ModuleType, common: ModuleType, models: dict[str, Any]) -> type:
    stock = runner.Runner

    class Runner(stock):
        """Runs what the page says, under our templates with the fields for video."""

        def _get(self, data: dict, where: str) -> Any:
            return data.get(self.manager.get_elem_by_id(where))

        def _initialize(self, data: dict, do_train: bool, from_preview: bool) -> str:
            error = super()._initialize(data, do_train, from_preview)
            if error or not is_ours(self._get(data, "top.template")):
                return error
            try:
                args = cleaned(self._parse_train_args(data) if do_train else self._parse_eval_args(data))
                check_given(args)
                check_datasets(args["dataset_dir"], args.get("dataset"), args.get("eval_dataset"), must_be_there=True)
            except ValueError as wrong:
                return str(wrong)
            if do_train and (over := self._over_fields(data)):
                runner.gr.Info(f"Extra arguments stand over fields: {', '.join(over)}")
            return ""

        def _over_fields(self, data: dict) -> list[str]:
            """Extra arguments that say something else than the field of the same key."""
            extra = json.loads(self._get(data, "train.extra_args"))
            given = {key: value for key, value in extra.items() if value is not None and key in FIELD_OF}
            fields = {key: self._get(data, FIELD_OF[key]) for key in given}
            return [f"{key} {value} (field: {fields[key]})" for key, value in given.items() if value != fields[key]]

        def _parse_train_args(self, data: dict) -> dict[str, Any]:
            if not is_ours(self._get(data, "top.template")):
                return super()._parse_train_args(data)
            element = self.manager.get_elem_by_id
            # What LLaMA-Board reads of these it reads as pixels of one frame, and only for models that it lists.
            pixels = [f"train.{name}" for name in (*IMAGE_FIELDS, *STOCK_FIELDS)]
            args = super()._parse_train_args({**data, **{element(where): "1" for where in pixels}})
            names = (*VIDEO_FIELDS, *IMAGE_FIELDS)
            args |= {name: entered(name, self._get(data, f"train.{name}")) for name in names}
            args |= {name: self._get(data, f"train.{name}") for name in FREEZE_FIELDS}
            args.pop("preprocessing_num_workers")  # 16, on however few cores
            return args | json.loads(self._get(data, "train.extra_args"))

        def _parse_eval_args(self, data: dict) -> dict[str, Any]:
            args = super()._parse_eval_args(data)
            args["media_dir"] = self._get(data, "eval.media_dir") or None
            if not args["temperature"]:
                args |= {"do_sample": False, "temperature": None, "top_p": None}
            if is_ours(args["template"]):
                args.pop("preprocessing_num_workers")
            return args

        def load_args(self, lang: str, config_path: str) -> dict:
            if not Path(config_path).is_file():
                return super().load_args(lang, config_path)
            element = self.manager.get_elem_by_id
            output_box = element("train.output_box")
            where = f"{config_path}: "  # of an error in the file itself
            try:
                recipe = read_recipe(Path(config_path))
                where = ""
                check_given(recipe)
                found = fields_of(recipe, element, runner.TRAINING_STAGES)
            except (ValueError, OSError) as wrong:
                runner.gr.Warning(f"{where}{wrong}")
                return {output_box: f"{where}{wrong}"}
            path = found["top.model_path"]
            found["top.model_name"] = name = next((n for n, paths in models.items() if path in paths.values()), CUSTOM)
            # The page asks for the path of a name whenever the name changes.
            common.save_config(lang, None, name, path)
            said = runner.ALERTS["info_config_loaded"][lang]
            return {
                output_box: f"{said} {config_path}",
                **{element(where): value for where, value in found.items()},
            }

    return Runner


def _with_scores(stock: Callable) -> Callable:
    def load_eval_results(path: str) -> str:
        """What LLaMA-Factory measures, below what `lmf-video score` does of the same answers."""
        text, file = stock(path), Path(path).with_name("generated_predictions.jsonl")
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if "predict_" in text else []
        if not lines or "source" not in lines[0]:  # of another template
            return text
        examples = [Example(line["source"], tuple(line["clips"]), line["label"]) for line in lines]
        report = make_report(examples, {"model": [line["predict"] for line in lines]})
        return f"```\n{table(report.value)}\n```\n\n{text}"

    return load_eval_results


# --- Reasons of errors ---


def _reason(error: Exception) -> str:
    """What a page says of an error; the console has where it was raised."""
    traceback.print_exception(error)
    text = str(error) or "no reason given; the console has more"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _reasons(stock: Callable) -> Callable:
    """What tells a page how something goes on also tells why it failed."""

    def telling(*args: Any) -> Iterator[Any]:
        try:
            yield from stock(*args)
        except Exception as error:  # whatever it is, the page would say no more than "Error"
            yield f"❌ {_reason(error)}"

    return telling


def _chatter(chatter: ModuleType) -> type:
    stock = chatter.WebChatModel

    class WebChatModel(stock):
        """Says why a model cannot be loaded, or a question not be answered."""

        def load_model(self, data: dict) -> Iterator[str]:
            yield from _reasons(super().load_model)(data)

        def stream(self, chatbot: list, messages: list, *args: Any) -> Iterator[tuple[list, list]]:
            before = list(chatbot)
            try:
                yield from super().stream(chatbot, messages, *args)
            except Exception as error:  # as above
                # The question is taken back, so that the next one is not asked behind it.
                yield [*before, {"role": "assistant", "content": f"❌ {_reason(error)}"}], messages[:-1]

    return WebChatModel


# --- The page ---


def _get_template(common: ModuleType) -> Callable:
    stock = common.get_template

    def get_template(model_name: str) -> str:
        ours = template_of(common.get_model_path(model_name)) if model_name == CUSTOM else None
        return ours or stock(model_name)

    return get_template


def _engine(engine: ModuleType, common: ModuleType) -> type:
    stock = engine.Engine

    class Engine(stock):
        def resume(self) -> Iterator[dict[Any, Any]]:
            """A page that opens with the model of last time has its recipe's values too."""
            updates = super().resume()
            opening = next(updates)
            name = None if self.pure_chat else common.load_config().get("last_model")
            if name and is_ours(template := common.get_template(name)):
                elements = {n: self.manager.get_elem_by_id(f"train.{n}") for n in FILLED}
                opening |= filled(elements, FILLED, template, "lora")
            yield opening
            yield from updates

    return Engine
