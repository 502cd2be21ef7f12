"""A Qwen3-VL small enough for a CPU: its own tokenizer, the real processor, random weights from a config.

Everything that a checkpoint folder of the real model holds is here under the same names, so that what runs
with this one runs with `Qwen/Qwen3-VL-4B-Instruct`. Given up: knowledge. The tokenizer knows the words of the demo
and falls back to bytes for any other text (three tokens for a Chinese character).
"""

import json
import shutil
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AddedToken,
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from . import game

# Qwen's added tokens, in Qwen's order. The special ones are left out when an answer is decoded.
SPECIAL_TOKENS = [
    *["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"],
    *["<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"],
    *["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"],
]
PLAIN_TOKENS = [
    *["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"],
    *["<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"],
]

# Renders what the template of the Instruct models renders; tests/test_demo.py compares the two.
CHAT_TEMPLATE = r"""
{%- set seen = namespace(image=0, video=0) -%}

{%- macro say(content, vision=false) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for item in content -%}
            {%- if vision and (item.type == 'image' or 'image' in item or 'image_url' in item) -%}
                {%- set seen.image = seen.image + 1 -%}
                {{- 'Picture %d: ' % seen.image if add_vision_id -}}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif vision and (item.type == 'video' or 'video' in item) -%}
                {%- set seen.video = seen.video + 1 -%}
                {{- 'Video %d: ' % seen.video if add_vision_id -}}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in item -%}
                {{- item.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}

{%- macro call(function) -%}
    {{- '<tool_call>\n{"name": "' ~ function.name ~ '", "arguments": ' -}}
    {{- function.arguments if function.arguments is string else function.arguments | tojson -}}
    {{- '}\n</tool_call>' -}}
{%- endmacro -%}

{%- set system = say(messages[0].content) if messages[0].role == 'system' else none -%}
{%- if tools -%}
    {{- '<|im_start|>system\n' ~ (system ~ '\n\n' if system is not none else '') -}}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' -}}
    {%- for tool in tools -%}
        {{- '\n' ~ (tool | tojson) -}}
    {%- endfor -%}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' -}}
    {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' -}}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' -}}
{%- elif system is not none -%}
    {{- '<|im_start|>system\n' ~ system ~ '<|im_end|>\n' -}}
{%- endif -%}

{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '<|im_start|>user\n' ~ say(message.content, vision=true) ~ '<|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' ~ say(message.content) -}}
        {%- for tool_call in message.tool_calls or [] -%}
            {{- '\n' if message.content or not loop.first -}}
            {{- call(tool_call.function or tool_call) -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- elif message.role == 'tool' -%}
        {#- Results of one round of calls share a user turn. -#}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' -}}
        {{- '\n<tool_response>\n' ~ say(message.content, vision=true) ~ '\n</tool_response>' -}}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' -}}
    {%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt -}}
"""


def build_tokenizer() -> Qwen2Tokenizer:
    """Qwen's byte-level BPE, with merges for the demo's words and the chat's own. The same at every call."""
    bpe = Qwen2Tokenizer().backend_tokenizer
    words = [*game.words(), "system", "user", "assistant", " seconds"]
    # Merging ends when every word is a token, long before this bound.
    trainer = BpeTrainer(vocab_size=4096, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator(words, trainer)
    model = json.loads(bpe.to_str())["model"]
    added = {
        token: AddedToken(token, special=token in SPECIAL_TOKENS, normalized=False)
        for token in SPECIAL_TOKENS + PLAIN_TOKENS
    }
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=None,
        eos_token=added["<|im_end|>"],
        pad_token=added["<|endoftext|>"],
        added_tokens_decoder=dict(enumerate(added.values(), start=len(model["vocab"]))),
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=32768,
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
    )


def build_processor() -> Qwen3VLProcessor:
    """Tokenizer, image and video processor and chat template, with the settings of the real checkpoints."""
    patches = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    normalize = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            size={"shortest_edge": 65536, "longest_edge": 16777216}, **patches, **normalize
        ),
        tokenizer=build_tokenizer(),
        video_processor=Qwen3VLVideoProcessor(
            size={"shortest_edge": 4096, "longest_edge": 25165824}, **patches, **normalize
        ),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(
    tokenizer: Qwen2Tokenizer,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    initializer_range: float | None = None,
) -> Qwen3VLConfig:
    """A Qwen3-VL of `layers` vision and `layers` language layers, both `hidden_size` wide.

    `initializer_range` defaults to 1 / sqrt(hidden_size): at this width the usual 0.02 leaves signals so small
    that nothing is learned in the demo's steps.
    """
    std = initializer_range or round(hidden_size**-0.5, 3)
    token = tokenizer.convert_tokens_to_ids
    third = hidden_size // heads // 6  # rotary pairs for height and for width; time takes the rest, as in the real one
    return Qwen3VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "head_dim": hidden_size // heads,
            "max_position_embeddings": tokenizer.model_max_length,
            "initializer_range": std,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_interleaved": True,
                "mrope_section": [hidden_size // heads // 2 - 2 * third, third, third],
            },
            "tie_word_embeddings": True,
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": layers,
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_heads": heads,
            "out_hidden_size": hidden_size,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": list(range(layers - 1))[:3],
            "initializer_range": std,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def build_model(config: Qwen3VLConfig, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """The model of `config` in float32, its weights drawn from `seed`; torch's own random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    end, pad = config.text_config.eos_token_id, config.text_config.pad_token_id
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=[end, pad], pad_token_id=pad)
    return model


def save_tiny_model(folder: Path, seed: int = 0, **sizes: float) -> None:
    """Write a checkpoint to `folder`, which must be new or empty; it appears there only when it is whole.

    `sizes` goes to `build_config`.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    processor = build_processor()
    processor.save_pretrained(unfinished)
    build_model(build_config(processor.tokenizer, **sizes), seed).save_pretrained(unfinished)
    unfinished.rename(folder)
