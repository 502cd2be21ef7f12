"""What families.py says of a model, against transformers' own classes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from llamafactory_video import families
from llamafactory_video.families import FAMILIES, family_of, module_of
from llamafactory_video.host.model import extend_model_loader
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_as_transformers_has_it(model_type):
    config = CONFIG_MAPPING[model_type]()
    config.text_config.num_hidden_layers = 1
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    family = family_of(model.config)
    assert [type(module).__name__ for module in model.modules()].count(family.core) == 1
    of_prefix = {"mm_projector": family.projector, "vision_tower": family.vision}
    for name, _ in model.named_parameters():
        (found,) = [
            module for module, prefixes in of_prefix.items() if any(f"model.{p}." in name for p in prefixes)
        ] or ["language_model"]
        assert module_of(name) == found, name


def test_other_models_are_named():
    with pytest.raises(ValueError, match="model_type qwen3 is not supported; known are qwen3_vl, qwen3_vl_moe"):
        family_of(SimpleNamespace(model_type="qwen3"))


def test_a_family_that_cannot_pack_says_so(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "qwen3_vl", replace(families.QWEN3_VL, packs=False))
    model = SimpleNamespace(config=SimpleNamespace(model_type="qwen3_vl"))
    loader = SimpleNamespace(load_model=lambda *args, **kwargs: model, load_tokenizer=None)
    extend_model_loader(loader)
    arguments = SimpleNamespace(video_template=True, block_diag_attn=False)
    assert loader.load_model(None, arguments, None) is model
    arguments.block_diag_attn = True
    with pytest.raises(ValueError, match="neat_packing does not work with qwen3_vl, whose samples would see each"):
        loader.load_model(None, arguments, None)
