"""Tiny models of the three architectures and a tokenizer made on the spot, for tests that need the real classes."""

from collections.abc import Sequence

import strategies
import torch
from multiverse import TAGS, BranchLayout, MultiverseForCausalLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

ARCHITECTURES = ("qwen2", "qwen3", "llama")
_CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}

#: Ids of the fixed vocabulary of `tiny_model`: digits, punctuation, end of sequence, padding, tags, plain words.
DIGITS = {str(digit): digit for digit in range(10)}
DOT, COLON, NEWLINE, EOS, PAD = 10, 11, 12, 13, 14
TOKEN_IDS = {tag: 15 + number for number, tag in enumerate(TAGS)}
FIRST_WORD, VOCABULARY = 27, 64

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(architecture: str, vocabulary: int = VOCABULARY, **fields) -> PreTrainedConfig:
    """A plain configuration with grouped-query attention; weights large enough for differences to show."""
    return _CONFIGS[architecture](
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": vocabulary,
            "initializer_range": 0.3,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            **fields,
        }
    )


def tiny_model(
    architecture: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, attention: str = "sdpa", **fields
) -> MultiverseForCausalLM:
    """A Multiverse model with random weights and the fixed vocabulary above, in evaluation mode."""
    torch.manual_seed(seed)
    model = MultiverseForCausalLM(tiny_config(architecture, **fields)).to(dtype).eval()
    model.set_attn_implementation(attention)
    model.config.multiverse_token_ids = dict(TOKEN_IDS)
    model.config.multiverse_separator_ids = [NEWLINE]
    model.config.multiverse_label_ids = {**DIGITS, ".": DOT, ":": COLON}
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without tags: every byte is a token, and a few words are merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for word in ("Path", "Goal", "Answer"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "bos_token": "<|im_start|>"})
    fast.chat_template = CHAT_TEMPLATE
    return fast


#: Names of the fixed vocabulary for texts written by hand: `_` is a newline, `$` the end of sequence.
WORDS: dict[str, int] = {
    **TOKEN_IDS,
    **DIGITS,
    **{".": DOT, ":": COLON, "_": NEWLINE, "$": EOS},
    **{word: FIRST_WORD + number for number, word in enumerate([*"abcdefghijklmnopqrstuvwxyz", "10", "12"])},
}
_STRATEGY_WORDS = {token_id: word for word, token_id in strategies.VOCABULARY.items()}


def tiny_ids(text: str) -> list[int]:
    """Ids in the fixed vocabulary of a text written as words between blanks."""
    return [WORDS[word] for word in text.split()]


def goal(outlines: Sequence[str]) -> str:
    """Words of a block up to its goal's end, with one outline for each path."""
    return "<Parallel> <Goal> " + " ".join(f"<Outline> {outline} </Outline>" for outline in outlines) + " </Goal>"


def from_strategy(ids: Sequence[int]) -> list[int]:
    """Takes a text of `strategies` over into the fixed vocabulary."""
    return [WORDS[_STRATEGY_WORDS[token_id]] for token_id in ids]


class Script:
    """A text, and what a model answers so that decoding writes it from any of its prefixes.

    A word that ends in `*` is forced by the engine; one that ends in `!` too, after the model answered with the end of
    sequence. An answer depends on what the layout says is seen at its place, and on nothing else.

    Args:
        text (`str`): words of `WORDS` between blanks.

    Attributes:
        ids (`list[int]`): the text.
        forced (`list[int]`): indices of the tokens that the engine forces.
    """

    def __init__(self, text: str) -> None:
        words = text.split()
        self.ids = tiny_ids(text.replace("*", "").replace("!", ""))
        self.forced = [index for index, word in enumerate(words) if word[-1] in "*!"]
        seen = BranchLayout.from_token_ids(self.ids, TOKEN_IDS).attention_mask().tril(-1)
        self._answers: dict[tuple[int, ...], int] = {}
        for index, (word, token_id) in enumerate(zip(words, self.ids, strict=True)):
            history = tuple(self.ids[other] for other in seen[index].nonzero().flatten().tolist())
            answer = EOS if word.endswith("!") else token_id
            known = self._answers.setdefault(history, answer)
            # Headers differ in paths that see the same; the first one's stands for a prompt that ends within it.
            assert known == answer or word.endswith("*"), f"{history} has two answers"

    def answer(self, history: Sequence[int]) -> int:
        """The model's next token where `history` is seen; a `KeyError` says that this is never to be seen."""
        return self._answers[tuple(history)]
