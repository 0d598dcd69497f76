"""Transformers and tokenizers small enough to build in a test."""

from __future__ import annotations

import pytest
import torch

WORDS = ["the", "of", "and", "a", "gate", "opens", "when", "its", "sum", "is", "above", "zero", "."]


def tiny_model(transformers, kind):
    sizes = dict(vocab_size=len(WORDS) + 3, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
    torch.manual_seed(0)
    llama = dict(sizes, intermediate_size=32, max_position_embeddings=32, num_key_value_heads=1, pad_token_id=0)
    config = {
        "bert": lambda: transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=32),
        "gpt2": lambda: transformers.GPT2Config(**sizes, n_positions=32, bos_token_id=1, eos_token_id=1),
        "llama": lambda: transformers.LlamaConfig(**sizes, intermediate_size=32, max_position_embeddings=32),
        "gemma2": lambda: transformers.Gemma2Config(**llama, head_dim=8),
        "gemma3": lambda: transformers.Gemma3TextConfig(**llama, head_dim=8),
        "olmo2": lambda: transformers.Olmo2Config(**llama),
        "qwen3": lambda: transformers.Qwen3Config(**llama, head_dim=8),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**sizes, intermediate_size=32, max_position_embeddings=32),
        "albert": lambda: transformers.AlbertConfig(**sizes, intermediate_size=32, embedding_size=8),
    }[kind]()
    return transformers.AutoModel.from_config(config).eval()


def tiny_tokenizer(transformers, kind):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if kind == "bert":
        tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = dict(cls_token="[CLS]", sep_token="[SEP]") if kind == "bert" else dict(bos_token="[CLS]")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **names)


def save_tiny_model(transformers, kind, folder):
    """The folder, holding a tiny model of that kind with random weights and its tokenizer."""
    tiny_model(transformers, kind).save_pretrained(folder)
    tiny_tokenizer(transformers, kind).save_pretrained(folder)
    return folder
