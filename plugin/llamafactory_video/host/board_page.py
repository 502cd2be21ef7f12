"""The tabs of LLaMA-Board with the group "Video", and what choices on the page bring about."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from .board_fields import (
    FILLED,
    OWN_FIELDS,
    RATE_FIELDS,
    STOCK_FIELDS,
    VIDEO_FIELDS,
    entered,
    plan_of_example,
    told,
)
from .board_recipes import CUSTOM, can_hold, recipe_for, template_of
from .core import is_ours


def _component(name: str, field: Any) -> Any:
    import gradio as gr

    if field.kind == "choice":
        return gr.Dropdown(choices=list(field.choices), value=field.choices[0], visible=False)
    if field.kind == "truth":
        return gr.Checkbox(value=name == "video_cache", visible=False)
    return gr.Textbox(visible=False)


def extend_train_tab(stock: Callable) -> Callable:
    import gradio as gr

    def create_train_tab(engine: Any) -> dict[str, Any]:
        own: dict[str, Any] = {}
        with gr.Accordion(open=True) as video_tab:
            names = iter(OWN_FIELDS)
            for count in (5, 4, 2):
                with gr.Row():
                    own |= {name: _component(name, VIDEO_FIELDS[name]) for name in islice(names, count)}
            shown = gr.Markdown()
        elements = _tab(stock, engine, own.values())
        # In front of the other groups, with the two fields that the page has already.
        _move(video_tab, before=elements["extra_tab"])
        for name in STOCK_FIELDS:
            _move(elements[name], before=own["video_total_pixels"])
        elements |= own | {"video_tab": video_tab, "video_shown": shown}
        _listen(engine, elements)
        return elements

    return create_train_tab


def _tab(stock: Callable, engine: Any, own: Iterable[Any]) -> dict[str, Any]:
    """LLaMA-Board's tab, whose buttons send components of ours too."""
    manager = engine.manager
    sent = {*manager.get_base_elems(), *own}
    manager.get_base_elems = lambda: {*sent}  # which the tab begins its own set with
    elements = stock(engine)
    del manager.get_base_elems
    return elements


def _move(component: Any, before: Any) -> None:
    """Lay a component of a page in front of another."""
    component.parent.children.remove(component)
    component.parent = before.parent
    before.parent.children.insert(before.parent.children.index(before), component)


def filled(elements: dict[str, Any], names: tuple[str, ...], template: str, finetuning_type: str) -> dict[Any, Any]:
    """Updates that give fields a recipe's values, or those that LLaMA-Board has for other templates.

    Args:
        elements: of the tab, by name.
    """
    import gradio as gr

    recipe = recipe_for(template, finetuning_type) if is_ours(template) else None
    updates = {}
    for name in names:
        element = elements[name]
        value = None if recipe is None else can_hold(element, recipe.get(name))
        if value is None:
            value = "" if recipe is not None and type(element) is gr.Textbox else element.value
        updates[element] = gr.update(value=value)
    return updates


def _listen(engine: Any, elements: dict[str, Any]) -> None:
    """What a person chooses fills fields with a recipe's values; what the fields make of a clip is told.

    Values follow what a person enters, not what changes: a recipe that is loaded changes much, and has values of its own.
    """
    import gradio as gr
    from llamafactory.extras.constants import SUPPORTED_MODELS
    from llamafactory.webui import common
    from transformers import Qwen3VLVideoProcessor

    names = ("lang", "model_name", "model_path", "template", "finetuning_type")
    lang, model, path, template, finetuning = (engine.manager.get_elem_by_id(f"top.{name}") for name in names)
    video_processor = Qwen3VLVideoProcessor()
    own, all_filled = [elements[name] for name in OWN_FIELDS], [elements[name] for name in FILLED]

    def by_model(name: str, kind: str) -> dict[Any, Any]:
        return filled(elements, FILLED, common.get_template(name), kind)

    def by_template(chosen: str, kind: str, name: str) -> dict[Any, Any]:
        updates = filled(elements, FILLED, chosen, kind)
        if is_ours(chosen) and name != CUSTOM and common.get_template(name or "") != chosen:
            models = (each for each in SUPPORTED_MODELS if common.get_template(each) == chosen)
            updates[model] = next((each for each in models if "4B" in each), name)  # the recipes' size
        return updates

    def by_path(given: str, chosen: str, kind: str) -> dict[Any, Any]:
        found = template_of(given) if given else None
        return {template: found, **filled(elements, FILLED, found, kind)} if found not in (None, chosen) else {}

    def by_type(kind: str, chosen: str) -> dict[Any, Any]:
        return filled(elements, RATE_FIELDS, chosen, kind) if is_ours(chosen) else {}

    def tell(language: str, chosen: str, *values: Any) -> str:
        if not is_ours(chosen):
            return ""
        try:
            given = {name: entered(name, value) for name, value in zip(VIDEO_FIELDS, values, strict=True)}
            return told(plan_of_example(given, video_processor), language)
        except ValueError as error:
            return f"⚠️ {error}"

    model.input(by_model, [model, finetuning], all_filled, queue=False)
    template.input(by_template, [template, finetuning, model], [model, *all_filled], queue=False)
    path.input(by_path, [path, template, finetuning], [template, *all_filled], queue=False)
    finetuning.input(by_type, [finetuning, template], [elements[name] for name in RATE_FIELDS], queue=False)
    template.change(lambda chosen: [gr.update(visible=is_ours(chosen))] * len(own), [template], own, queue=False)
    told_of = [lang, template, *(elements[name] for name in VIDEO_FIELDS)]
    gr.on([element.change for element in told_of], tell, told_of, [elements["video_shown"]], queue=False)


def extend_eval_tab(stock: Callable) -> Callable:
    import gradio as gr

    def create_eval_tab(engine: Any) -> dict[str, Any]:
        with gr.Row() as row:
            media_dir = gr.Textbox(scale=2)
        elements = _tab(stock, engine, [media_dir])
        _move(media_dir, before=elements["dataset"])
        row.parent.children.remove(row)
        elements["media_dir"] = media_dir
        _with_likeliest(engine, elements["temperature"])
        names = ("dataset_dir", "media_dir", "cutoff_len")

        def by_template(chosen: str) -> list[Any]:
            recipe = recipe_for(chosen, "full") if is_ours(chosen) else {}
            return [gr.update(value=recipe.get(name, elements[name].value)) for name in names]

        template = engine.manager.get_elem_by_id("top.template")
        template.change(by_template, [template], [elements[name] for name in names], queue=False)
        return elements

    return create_eval_tab


def extend_infer_tab(stock: Callable) -> Callable:
    def create_infer_tab(engine: Any) -> dict[str, Any]:
        elements = stock(engine)
        _with_likeliest(engine, elements["temperature"])
        return elements

    return create_infer_tab


def _with_likeliest(engine: Any, temperature: Any) -> None:
    """Temperatures of our templates begin at 0, the likeliest answer, which is taken unless another is chosen."""
    import gradio as gr

    usual = {"value": temperature.value, "minimum": temperature.minimum}
    template = engine.manager.get_elem_by_id("top.template")
    template.change(
        lambda chosen: gr.update(**({"value": 0.0, "minimum": 0.0} if is_ours(chosen) else usual)),
        [template],
        [temperature],
        queue=False,
    )
