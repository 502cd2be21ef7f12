"""Every place of LLaMA-Factory that the plugin extends: module -> what is needed there, what is installed there.

LLaMA-Factory loads no plugins. `llamafactory_video/__init__.py` waits for its modules and calls `install` right after
each has run, and before others import names from it. Before the first installation the sources of all modules are
checked for every place that is extended, so a LLaMA-Factory that lacks one gives one clear error and no half-installed
plugin.
"""

import ast
import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType

from .. import DISABLE_VARIABLE
from .core import SUPPORTED_VERSIONS, UnsupportedLlamaFactory

# module -> (what is needed there, the function of this folder that extends it once it is imported). Needed are names, with the parameters that
# are used, methods as Class.method, and words of the source that are no names.
TABLE: dict[str, tuple[dict[str, str], str | None]] = {
    "llamafactory.hparams.parser": (
        {
            "_TRAIN_ARGS": "",
            "_INFER_ARGS": "",
            "_EVAL_ARGS": "",
            "get_last_checkpoint": "",
            "logger": "",
            "_parse_train_args": "args",
            "_parse_infer_args": "args",
            "_parse_eval_args": "args",
            "ModelArguments": "",
            "DataArguments": "",
            "FinetuningArguments": "",
        },
        "parser.extend_parser",
    ),
    "llamafactory.data.converter": (
        {"register_dataset_converter": "name dataset_converter", "DATASET_CONVERTERS": "", "DatasetConverter": ""},
        "data.extend_converter",
    ),
    "llamafactory.data.mm_plugin": (
        {
            "register_mm_plugin": "name plugin_class",
            "PLUGINS": "",
            "BasePlugin.process_messages": "messages images videos audios processor",
            "BasePlugin.process_token_ids": "input_ids labels images videos audios tokenizer processor",
            "BasePlugin.get_mm_inputs": "images videos audios imglens vidlens audlens batch_ids processor",
            "MMPluginMixin._validate_input": "processor images videos audios",
        },
        "prompt.extend_mm_plugin",
    ),
    "llamafactory.data.template": (
        {
            "register_template": "name mm_plugin template_class",
            "TEMPLATES": "",
            "Template.encode_oneturn": "tokenizer messages system tools",
            "Template.encode_multiturn": "tokenizer messages system tools",
            "Template.fix_jinja_template": "tokenizer",
            "get_mm_plugin": "",
            'name="qwen3_vl"': "",
        },
        "prompt.extend_templates",
    ),
    "llamafactory.data.processor.supervised": (
        {
            "PackedSupervisedDatasetProcessor.preprocess_dataset": "examples",
            "SupervisedDatasetProcessor._encode_data_example": "prompt response system tools images videos audios",
        },
        "items.extend_packing",
    ),
    "llamafactory.data.collator": (
        {"SFTDataCollatorWith4DAttentionMask.__call__": "features"},
        "prompt.extend_collator",
    ),
    "llamafactory.data.loader": (
        {
            "_load_single_dataset": "dataset_attr model_args data_args training_args",
            "get_dataset": "template model_args data_args training_args stage tokenizer processor",
            "get_dataset_list": "",
            "merge_dataset": "",
            "split_dataset": "",
            "get_dataset_module": "",
            "_get_preprocessed_dataset": "dataset data_args training_args stage template tokenizer processor is_eval",
            "logger": "",
        },
        "data.extend_data_loader",
    ),
    "llamafactory.model.patcher": (
        {
            "patch_processor": "processor tokenizer model_args",
            "patch_tokenizer": "tokenizer model_args",
            "logger": "",
        },
        "model.extend_patcher",
    ),
    "llamafactory.model.model_utils.visual": (
        {
            "COMPOSITE_MODELS": "",
            "CompositeModel": "",
            'model_type="qwen3_vl"': "",
            'model_type="qwen3_vl_moe"': "",
            "projector_keys: list": "",
            "vision_model_keys: list": "",
        },
        None,
    ),
    "llamafactory.model.loader": (
        {"load_model": "tokenizer model_args finetuning_args", "load_tokenizer": "model_args"},
        "model.extend_model_loader",
    ),
    "llamafactory.train.trainer_utils": (
        {"create_custom_optimizer": "model training_args finetuning_args", "logger": ""},
        "train.extend_optimizer",
    ),
    "llamafactory.train.sft.trainer": (
        {"CustomSeq2SeqTrainer.save_predictions": "dataset predict_results skip_special_tokens"},
        "train.extend_trainer",
    ),
    "llamafactory.train.sft.workflow": (
        {
            "CustomSeq2SeqTrainer": "",
            "create_modelcard_and_push": "",
            "logger": "",
            "run_sft": "model_args data_args training_args finetuning_args generating_args",
        },
        "train.extend_workflow",
    ),
    "llamafactory.train.callbacks": (
        {"LogCallback.on_log": "args state control", "LogCallback._write_log": "output_dir logs"},
        None,
    ),
    "llamafactory.train.tuner": ({"export_model": "args", "logger": ""}, "export.extend_tuner"),
    "llamafactory.chat.hf_engine": (
        {
            "HuggingfaceEngine.__init__": "model_args data_args finetuning_args generating_args",
            "HuggingfaceEngine.chat": "messages system tools images videos audios",
            "HuggingfaceEngine.stream_chat": "messages system tools images videos audios",
            "Response": "",
        },
        "engine.extend_engine",
    ),
    "llamafactory.api.app": ({"create_app": "chat_model"}, "api.extend_api"),
    "llamafactory.webui.common": (
        {
            **{"_clean_cmd": "args", "save_cmd": "args", "gen_cmd": "args", "get_template": "model_name"},
            **{
                "save_config": "lang hub_name model_name model_path",
                "load_config": "",
                "get_model_path": "model_name",
            },
            **{"TRAINING_ARGS": "", "DEFAULT_CONFIG_DIR": "", "load_eval_results": "path"},
        },
        None,
    ),
    "llamafactory.webui.control": (
        {
            **{
                "list_config_paths": "current_time",
                "list_checkpoints": "model_name finetuning_type",
                "PEFT_METHODS": "",
            },
            "get_trainer_info": "lang output_path do_train",
            "TRAINER_LOG": "",
        },
        None,
    ),
    "llamafactory.webui.runner": (
        {
            "Runner._initialize": "data do_train from_preview",
            "Runner._parse_train_args": "data",
            "Runner._parse_eval_args": "data",
            "Runner.load_args": "lang config_path",
            "TRAINING_STAGES": "",
            "ALERTS": "",
        },
        None,
    ),
    "llamafactory.webui.chatter": (
        {"WebChatModel.load_model": "data", "WebChatModel.stream": "chatbot messages"},
        None,
    ),
    "llamafactory.webui.engine": ({"Engine.resume": ""}, None),
    "llamafactory.webui.locales": ({"LOCALES": ""}, None),
    "llamafactory.webui.components.export": ({"save_model": ""}, None),
    "llamafactory.webui.components.infer": ({"is_multimodal": ""}, None),
    "llamafactory.webui.interface": (
        {"create_train_tab": "", "create_eval_tab": "", "create_infer_tab": "", "Engine": ""},
        "board.extend_board",
    ),
    "llamafactory.chat.chat_model": (
        {"run_chat": "", "ChatModel.stream_chat": "messages images videos"},
        "chat.extend_chat",
    ),
}
installed: set[str] = set()


def _defined_names(source: str) -> dict[str, set[str] | None]:
    """Names in a module's source, methods as Class.method; of functions with their parameters, else None."""
    names: dict[str, set[str] | None] = {}

    def take(node: ast.AST, prefix: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names[prefix + node.name] = {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]}
        elif isinstance(node, ast.ClassDef):
            names[node.name] = None
            for child in node.body:
                take(child, f"{node.name}.")
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names.update({alias.asname or alias.name: None for alias in node.names})
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update({target.id: None for target in targets if isinstance(target, ast.Name)})
        elif isinstance(node, ast.If | ast.Try):
            for child in ast.iter_child_nodes(node):
                take(child, prefix)

    for node in ast.parse(source).body:
        take(node, "")
    return names


@functools.cache
def check_places(root: Path) -> None:
    """Check that the package in folder `root` has every place of the table.

    Raises:
        UnsupportedLlamaFactory: naming the first missing place and the versions that work.
    """
    for module, (needed, _) in TABLE.items():
        file = root.joinpath(*module.split(".")[1:]).with_suffix(".py")
        source = file.read_text(encoding="utf-8") if file.is_file() else ""
        found = _defined_names(source)
        for name, parameters in needed.items():
            missing = (
                name if name not in found and (name.replace(".", "").isidentifier() or name not in source) else None
            )
            if missing is None and found.get(name) is not None:
                missing = next((f"{name}({p}=…)" for p in parameters.split() if p not in found[name]), None)
            if missing:
                from importlib.metadata import version

                raise UnsupportedLlamaFactory(
                    f"llamafactory-video extends {module}.{missing}, which this LLaMA-Factory "
                    f"({version('llamafactory')}, in {root}) does not have. It works with LLaMA-Factory "
                    f"{SUPPORTED_VERSIONS}: pip install llamafactory=={SUPPORTED_VERSIONS}. To run LLaMA-Factory "
                    f"without this plugin, set {DISABLE_VARIABLE}=1."
                )


def prepare() -> None:
    """Check, before LLaMA-Factory's first module runs, that every place of the table is there."""
    check_places(Path(sys.modules["llamafactory"].__path__[0]))


def install(module: ModuleType) -> None:
    """Install into a module of the table that has just run."""
    extend = TABLE[module.__name__][1]
    if extend is not None:
        file, _, function = extend.partition(".")
        getattr(importlib.import_module(f"{__package__}.{file}"), function)(module)
    installed.add(module.__name__)
