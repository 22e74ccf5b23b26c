"""Tiny hosts with random weights, and a processor whose tokenizer is made on the spot."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import hia
from hia.phantom.host import CLIPImageProcessor

PATCH, IMAGE_SIZE = 14, 28
TOKENS_PER_IMAGE = (IMAGE_SIZE // PATCH) ** 2
WORDS = "compare the two studies of chest knee what changed between them is there a fracture yes no new old lesion left"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
PUNCTUATION = ["\n", ":", "?", "."]
VOCABULARY = {word: number for number, word in enumerate([*SPECIAL, *PUNCTUATION, *WORDS.split(), "USER", "ASSISTANT"])}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def tiny_processor() -> LlavaProcessor:
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        images,
        tiny_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def text_config(layers: int = 6, **changes) -> LlamaConfig:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    return LlamaConfig(**{**sizes, **changes})


def llava_config(layers: int = 6, **changes) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text_config(layers, **changes),
        image_token_index=VOCABULARY["<image>"],
        pad_token_id=3,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )


def tiny_llava(layers: int = 6, seed: int = 0, **changes) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(llava_config(layers, **changes)).eval()
    with torch.no_grad():  # HF's 0.02 leaves attention nearly uniform: nothing would depend on anything
        for parameter in model.parameters():
            parameter.normal_(std=0.15) if parameter.dim() > 1 else None
    return model


def tiny_llama(layers: int = 6, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(text_config(layers)).eval()


def tiny_config(host, preset: str = "paper", **changes) -> hia.HiAConfig:
    small = {"num_queries": 8, "encoder_width": 4, **changes}
    if preset == "lite":
        small.setdefault("dim", 32)
    if preset == "released":
        small.setdefault("num_heads", 4)
    return getattr(hia.HiAConfig, preset)(host, **small)


def stir(model: hia.HiAModel, seed: int = 1) -> hia.HiAModel:
    """Make every adapter parameter random, as if trained, so that the injection shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.adapter.named_parameters():
            noise = 0.05 if name.startswith("encoder.") else 0.3  # fp16 overflows behind 16 wilder blocks
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * noise)
    return model
