"""FLOPs of training, against torch's own counter over the operations of a real, tiny Qwen3-VL."""

import json
import time

import pytest
import torch
from conftest import SHARED
from llamafactory_video.demo.tiny_model import build_config, build_model, build_tokenizer
from llamafactory_video.train.flops import peak_flops, trained_modules, training_flops
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

VIDEO, IMAGE = (3, 4, 6), (1, 8, 4)
MODULES = {
    "vision_tower": ("visual.blocks", "visual.patch_embed", "visual.pos_embed"),
    "mm_projector": ("merger",),
    "language_model": ("language_model", "lm_head"),
}


@pytest.fixture(scope="module")
def config():
    # Different numbers of everything, so that none can stand for another.
    tokenizer = build_tokenizer()
    config = build_config(tokenizer, hidden_size=48, layers=3, heads=4)
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 32, 80
    config.vision_config.deepstack_visual_indexes = [0, 1]
    config.text_config.num_hidden_layers = 4
    config.text_config.head_dim = 24
    config.text_config.rope_parameters["mrope_section"] = [4, 4, 4]
    config._attn_implementation = "eager"  # torch counts no FLOPs of the CPU's fused attention
    return config


def batch(config, rows: int, text: int, videos=(), images=()) -> dict[str, torch.Tensor]:
    """`rows` alike; each has the same clips and images, and `text` tokens behind."""
    ids, types = [], []
    for kind, token, grids in ((2, config.video_token_id, videos), (1, config.image_token_id, images)):
        for t, h, w in grids:
            for _ in range(t):
                ids += [config.vision_start_token_id] + [token] * (h * w // 4) + [config.vision_end_token_id]
                types += [0] + [kind] * (h * w // 4) + [0]
    ids, types = ids + list(range(5, 5 + text)), types + [0] * text
    given = {
        "input_ids": torch.tensor([ids] * rows),
        "mm_token_type_ids": torch.tensor([types] * rows),
        "attention_mask": torch.ones(rows, len(ids), dtype=torch.long),
    }
    for name, pixels, grids in (
        ("video_grid_thw", "pixel_values_videos", videos),
        ("image_grid_thw", "pixel_values", images),
    ):
        if grids:
            given[name] = torch.tensor(list(grids) * rows)
            given[pixels] = torch.randn(int(given[name].prod(-1).sum()), 3 * 2 * 16 * 16)
    return given


def counted(model, inputs, backward: bool = True) -> int:
    """By torch, without the rotary angles, which are a product for the computer and none of the model."""
    language = (model.get_base_model() if isinstance(model, PeftModel) else model).model.language_model
    with FlopCounterMode(display=False) as angles:
        language.rotary_emb(torch.zeros(1), torch.zeros(3, *inputs["input_ids"].shape))
    with FlopCounterMode(display=False) as counter:
        logits = model(**inputs).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() - angles.get_total_flops()


def unseen_pairs(config, rows: int, length: int, backward: bool) -> int:
    """What eager attention computes for pairs that must not see each other: it computes all length * length."""
    text = config.text_config
    pairs = rows * (length * length - length * (length + 1) // 2)
    return pairs * 4 * text.num_attention_heads * text.head_dim * text.num_hidden_layers * (3 if backward else 1)


def all_grids(inputs) -> list[list[int]]:
    return [grid for name in ("video_grid_thw", "image_grid_thw") if name in inputs for grid in inputs[name].tolist()]


SEEN = {
    "video": {"videos": [VIDEO]},
    "image": {"images": [IMAGE]},
    "both": {"videos": [VIDEO, (1, 4, 4)], "images": [IMAGE]},
    "text": {},
}


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize(
    "trained",
    [
        ("vision_tower", "mm_projector", "language_model"),
        ("mm_projector", "language_model"),
        ("vision_tower", "language_model"),
        ("language_model",),
        ("vision_tower",),
        ("mm_projector",),
    ],
    ids="+".join,
)
def test_every_product_is_counted_as_torch_counts_it(config, trained, seen):
    model = build_model(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(mark in name for module in trained for mark in MODULES[module]))
    trains = trained_modules(model.named_parameters())
    assert trains == dict.fromkeys(trained, "full")
    inputs = batch(config, rows=2, text=11, **SEEN[seen])
    backward = seen != "text" or "language_model" in trained  # a text trains nothing of what sees
    length = inputs["input_ids"].shape[1]
    ours = training_flops(config, [length] * 2, all_grids(inputs), trains)
    assert ours + unseen_pairs(config, 2, length, backward) == counted(model, inputs, backward)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize(
    "trained",
    [("language_model",), ("vision_tower", "mm_projector", "language_model"), ("mm_projector",)],
    ids="+".join,
)
def test_lora_trains_no_weight_below_it(config, trained, seen):
    """Adapters on every linear layer; their own products are counted by torch and are all that differs."""
    rank, marks = 2, [mark for module in trained for mark in MODULES[module]]
    base = build_model(config)
    linear = [
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and any(mark in name for mark in marks)
    ]
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=linear))
    trains = trained_modules(model.named_parameters())
    assert trains == dict.fromkeys(trained, "lora")
    inputs = batch(config, rows=2, text=11, **SEEN[seen])
    backward = seen != "text" or "language_model" in trained
    length = inputs["input_ids"].shape[1]
    ours = training_flops(config, [length] * 2, all_grids(inputs), trains) + unseen_pairs(config, 2, length, backward)
    adapters = adapter_flops(model, inputs, backward)
    assert ours + adapters == counted(model, inputs, backward)


def adapter_flops(model, inputs, backward: bool) -> int:
    """Of the factors A and B, by the shapes that they meet: forward, gradient of the weight, and of the input."""
    total = 0

    def count(module, args, output):
        nonlocal total
        rows = args[0].numel() // args[0].shape[-1]
        forward = 2 * rows * module.in_features * module.out_features
        total += forward * (1 + (1 + args[0].requires_grad if backward else 0))

    hooks = [
        module.register_forward_hook(count)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ("lora_A." in name or "lora_B." in name)
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return total


def test_adapters_beside_a_trained_module_are_told_apart(config):
    """As LLaMA-Factory's additional_target makes them: LoRA in the language model, the projector trained whole."""
    model = get_peft_model(
        build_model(config), LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["merger"])
    )
    assert trained_modules(model.named_parameters()) == {"language_model": "lora", "mm_projector": "full"}


def test_samples_packed_into_one_row_do_not_see_each_other(config):
    apart = training_flops(config, [30, 50], [VIDEO], {"language_model": "full"})
    whole = training_flops(config, [80], [VIDEO], {"language_model": "full"})
    text = config.text_config
    pairs = 80 * 81 // 2 - 30 * 31 // 2 - 50 * 51 // 2
    assert whole - apart == 3 * 4 * pairs * text.num_attention_heads * text.head_dim * text.num_hidden_layers


def test_the_output_head_counts_where_it_is_computed(config):
    model = build_model(config)
    inputs = batch(config, rows=1, text=20)
    length = inputs["input_ids"].shape[1]
    found = counted(model, {**inputs, "logits_to_keep": 6})
    ours = training_flops(config, [length], [], {"language_model": "full"}, supervised=6)
    assert ours + unseen_pairs(config, 1, length, True) == found


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="model_type qwen3 is not supported; known are qwen3_vl"):
        training_flops(Qwen3Config(), [8], [], {})


def test_counting_a_batch_costs_next_to_nothing(config):
    """Best of five; a step of training takes a thousand times as long."""
    trains = dict.fromkeys(MODULES, "full")
    times = []
    for _ in range(5):
        start = time.perf_counter()
        training_flops(config, [700] * 64, [(16, 8, 14)] * 64, trains)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.001


@pytest.mark.skipif(not (SHARED / "qwen3vl").is_dir(), reason="../shared/qwen3vl is not present")
def test_the_4b_model_counts_as_the_measurements_of_this_project_do():
    """They took 6 x weights x tokens or patches: 21.7 TFLOP for 713 tokens, 448 of them of 16 x 8 x 14 patches.

    That counts the mergers for every patch, where they see a quarter of them, and embeddings of positions, which are
    no product, but no attention.
    """
    config = Qwen3VLConfig(**json.loads((SHARED / "qwen3vl" / "config.json").read_text()))
    with torch.device("meta"):
        visual = Qwen3VLVisionModel(config.vision_config)
    patches = 16 * 8 * 14
    assert patches // 4 == 448
    mergers = sum(p.numel() for name, p in visual.named_parameters() if "merger" in name)
    text, vision = config.text_config, config.vision_config
    attention = 3 * 4 * 713 * 714 // 2 * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    attention += 3 * 4 * 16 * (8 * 14) ** 2 * vision.hidden_size * vision.depth
    ours = training_flops(config, [713], [(16, 8, 14)], dict.fromkeys(MODULES, "full"))
    theirs = ours - attention + 6 * patches * (mergers * 3 // 4 + visual.pos_embed.weight.numel())
    assert theirs / 1e12 == pytest.approx(21.7, abs=0.05)


def test_the_peak_of_this_machine_is_that_of_a_matrix_product():
    state = torch.get_rng_state()
    start = time.perf_counter()
    found = peak_flops("cpu", torch.float32)
    assert time.perf_counter() - start < 5
    assert torch.equal(torch.get_rng_state(), state)
    a = torch.randn(1024, 1024)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    assert 1 / 3 < found / (2 * 1024**3 / min(times)) < 3  # other processes share the cores
