"""A miniature of the published Multiverse-32B, laid out as transformers 4.51 and the published training code left it.

That code takes Qwen2.5-Instruct, gives the tokenizer the twelve tags as additional special tokens, sets its padding
to `<|fim_pad|>` and the model's rows to the next multiple of 64; configuration and model type stay those of Qwen2.
Only numbers are smaller here. Nothing in the folder mentions this package.
"""

import json
from pathlib import Path
from typing import Any

import torch
from multiverse import TAGS
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import Qwen2Config, Qwen2ForCausalLM

#: Qwen2.5's added tokens in their order, and whether they are special.
_QWEN_TOKENS = {
    **dict.fromkeys(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"), True
    ),
    **dict.fromkeys(("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"), True),
    **dict.fromkeys(("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"), True),
    **dict.fromkeys(("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"), False),
    **dict.fromkeys(("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"), False),
}
_PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a "
    "helpful assistant.<|im_end|>\n{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = ["Path Goal Outline Conclusion Parallel Think", "find the sum of the first ten numbers, path by path"] * 4
#: Tokens that text is made of: every byte, and a few merges.
_WORDS = 290


def published_tokenizer(tags: tuple[str, ...] = TAGS, special: bool = True) -> Tokenizer:
    """A byte-level tokenizer with Qwen2.5's parts, trained on a few words.

    Args:
        tags (`tuple[str, ...]`): that it knows.
        special (`bool`): whether they are special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_PRE_TOKENIZER), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_WORDS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    for token, is_special in {**_QWEN_TOKENS, **dict.fromkeys(tags, special)}.items():
        tokenizer.add_tokens([AddedToken(token, special=is_special, normalized=False)])
    return tokenizer


def write_published(folder: Path, tags: tuple[str, ...] = TAGS, special: bool = True, dtype: str = "bfloat16") -> Path:
    """Writes the miniature.

    Args:
        folder (`Path`): to be made.
        tags (`tuple[str, ...]`): that the tokenizer knows; none for Qwen2.5 itself.
        special (`bool`): whether they are special tokens, with the padding of the training code; else ordinary ones,
            with Qwen2.5's own padding.
        dtype (`str`): of the weights.
    """
    tokenizer = published_tokenizer(tags, special)
    ids = tokenizer.get_vocab()
    # As many rows as Qwen2.5 has to spare (152,064 for 151,665 tokens), or as the training code leaves.
    rows = -(-len(ids) // 64) * 64 + (0 if tags else 64)
    _write_weights(folder, rows, dtype)
    _write(folder / "config.json", _config(ids, rows, dtype))
    _write(folder / "generation_config.json", _generation_config(ids))
    _write_tokenizer(folder, tokenizer, tags if special else (), "<|fim_pad|>" if special else "<|endoftext|>")
    return folder


def _write_weights(folder: Path, rows: int, dtype: str) -> None:
    torch.manual_seed(0)
    sizes = {name: value for name, value in _SIZES.items() if name != "rope_theta"}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=rows, **sizes)).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="20KB")


#: Grouped-query attention as in the original, whose 40 heads share 8.
_SIZES: dict[str, Any] = {
    "hidden_size": 40,
    "initializer_range": 0.3,
    "intermediate_size": 56,
    "max_position_embeddings": 32768,
    "num_attention_heads": 10,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
}


def _config(ids: dict[str, int], rows: int, dtype: str) -> dict[str, Any]:
    return {
        "_name_or_path": "Qwen/Qwen2.5-32B-Instruct",
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        **_SIZES,
        "max_window_layers": 64,
        "model_type": "qwen2",
        "rope_scaling": None,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "transformers_version": "4.51.3",
        # Trained with gradient checkpointing.
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": rows,
    }


def _generation_config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "transformers_version": "4.51.3",
    }


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, tags: tuple[str, ...], padding: str) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    added = tokenizer.get_added_tokens_decoder()
    _write(folder / "added_tokens.json", {token.content: number for number, token in added.items()})
    names = ("content", "lstrip", "normalized", "rstrip", "single_word")
    # The training code puts the tags in the place of Qwen2.5's own list.
    additional = list(tags) or [token for token, special in _QWEN_TOKENS.items() if special][1:]
    padded = {name: getattr(AddedToken(padding, normalized=False), name) for name in names}
    end = {**padded, "content": "<|im_end|>"}
    special_tokens = {"additional_special_tokens": additional, "eos_token": end, "pad_token": padded}
    _write(folder / "special_tokens_map.json", special_tokens)
    _write(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(number): {name: getattr(token, name) for name in (*names, "special")}
                for number, token in sorted(added.items())
            },
            "additional_special_tokens": additional,
            "bos_token": None,
            "chat_template": _CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "extra_special_tokens": {},
            "model_max_length": 131072,
            "pad_token": padding,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
