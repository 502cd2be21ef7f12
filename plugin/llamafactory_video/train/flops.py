"""Model FLOPs of training Qwen3-VL, for MFU (model FLOPs utilisation): arithmetic on the config, no model needed.

Counted are matrix products, a multiply-add as 2: patch embedding, attention, MLPs, mergers and the output head, forward
and backward. Not counted: norms, activations, rotary embeddings, the interpolation of position embeddings, padding,
the optimizer, what gradient checkpointing computes again, and the small products of LoRA's own factors.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..families import family_of, module_of

# Of one LoRA adapter in peft; its other parameters ("lora_embedding_A", DoRA's magnitude) begin alike.
_LORA_MARK = "lora_"


def trained_modules(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, str]:
    """Which of `families.MODULES` are trained: "lora" where only adapters are, else "full"; frozen ones are left out."""
    trains: dict[str, str] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            how = "lora" if _LORA_MARK in name else "full"
            module = module_of(name)
            trains[module] = "full" if "full" in (how, trains.get(module)) else "lora"
    return trains


def training_flops(
    config: Any,
    text_lengths: Sequence[int],
    grids: Sequence[Sequence[int]],
    trains: Mapping[str, str],
    supervised: int | None = None,
) -> int:
    """FLOPs of one forward and backward pass.

    The backward pass of a product takes one forward for the gradient of its weight, if that is trained, and one for
    that of its input, if anything below is trained. The two products of attention take two each where anything that
    they are made of is trained. Causal attention counts the pairs that see each other, n * (n + 1) / 2 of n * n;
    kernels that compute all pairs do more than is counted here.

    Args:
        config: transformers' Qwen3VLConfig.
        text_lengths: tokens of each sequence, visual ones too, without padding, (n,); of a packed row each sample's own.
        grids: (t, h, w) of each clip and image, in patches before merging, as in `video_grid_thw`, (m, 3).
        trains: by module, as `trained_modules` gives it: "full" or "lora"; frozen modules are left out.
        supervised: positions at which the output head is counted; None: all of `text_lengths`, as transformers
            computes them.

    Raises:
        ValueError: if the arithmetic of the model is not known.
    """
    if not family_of(config).counts_flops:
        raise ValueError(f"FLOPs of {config.model_type} are not known")
    vision, text = config.vision_config, config.text_config
    tower, projector, language = (trains.get(m) for m in ("vision_tower", "mm_projector", "language_model"))

    # Vision: `pairs` are patches that see each other, all those of one time slice.
    width, depth = vision.hidden_size, vision.depth
    patches = sum(t * h * w for t, h, w in grids)
    pairs = sum(t * (h * w) ** 2 for t, h, w in grids)
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    embed = 2 * patches * pixels * width
    qkv = 2 * patches * 3 * width**2
    rest = 2 * patches * (width**2 + 2 * width * vision.intermediate_size)
    flops = _product(embed, tower, False)
    # The first block has nothing trained below its qkv when only adapters are.
    flops += _product(qkv, tower, tower == "full") + _product(qkv, tower, bool(tower)) * (depth - 1)
    flops += _product(rest, tower, bool(tower)) * depth + _attention(4 * width * pairs, bool(tower)) * depth

    # Mergers, after the last block and for DeepStack; each begins with a norm, which full training trains.
    unit = vision.spatial_merge_size**2
    first = 2 * (patches // unit) * (unit * width) ** 2
    second = 2 * (patches // unit) * unit * width * vision.out_hidden_size
    mergers = 1 + len(vision.deepstack_visual_indexes)
    flops += mergers * _product(first, projector, bool(tower) or projector == "full")
    flops += mergers * _product(second, projector, bool(tower or projector))

    # Language model: the input of its first layer has a gradient if the embeddings or what is seen have one.
    width, layers = text.hidden_size, text.num_hidden_layers
    heads, kv_heads = (n * text.head_dim for n in (text.num_attention_heads, text.num_key_value_heads))
    tokens = sum(text_lengths)
    pairs = sum(n * (n + 1) // 2 for n in text_lengths)
    qkv = 2 * tokens * width * (heads + 2 * kv_heads)
    rest = 2 * tokens * width * (heads + 3 * text.intermediate_size)
    head = 2 * (tokens if supervised is None else supervised) * width * text.vocab_size
    below = language == "full" or (bool(tower or projector) and patches > 0)
    inside = below or bool(language)
    flops += _product(qkv, language, below) + _product(qkv, language, inside) * (layers - 1)
    flops += _product(rest, language, inside) * layers + _attention(4 * heads * pairs, inside) * layers
    return flops + _product(head, "full" if language == "full" else None, inside)


def _product(forward: int, trained: str | None, below: bool) -> int:
    """FLOPs of a product with a weight, forward and backward.

    Args:
        trained: "full", "lora" or None.
        below: its input gets a gradient.
    """
    return forward * (1 + (trained == "full") + below)


def _attention(forward: int, trained: bool) -> int:
    return forward * (3 if trained else 1)


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, measured: the best of several, after one to warm up.

    On a GPU 8192 x 8192 in some 0.1 to 0.3 s, on a CPU 1024 x 1024 in some 0.5 s, of random numbers: zeros take less
    power, and so run at higher clocks.
    """
    device = torch.device(device)
    size, at_once, seconds = (1024, 1, 0.3) if device.type == "cpu" else (8192, 4, 0.1)

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    out = a @ b
    wait()
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds or best == float("inf"):
        start = time.perf_counter()
        for _ in range(at_once):  # so that starting them weighs little
            torch.mm(a, b, out=out)
        wait()
        best = min(best, (time.perf_counter() - start) / at_once)
    return 2 * size**3 / best
