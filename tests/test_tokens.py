"""`add_multiverse_tokens`: twelve tags as single tokens, new rows from the words' rows, and nothing else changed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import every_architecture
from multiverse import TAGS, MultiverseForCausalLM, add_multiverse_tokens
from tiny import tiny_config, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

tied_and_untied = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
every_tag = pytest.mark.parametrize("tag", TAGS)

SAMPLE = (
    "<Think>\nWe add.\n<Parallel>\n<Goal>\n<Outline>\n1: one\n</Outline>\n<Outline>\n2: two\n</Outline>\n</Goal>\n"
    "<Path>\n1: 17+25=42\n</Path>\n<Path>\n2: 4*5=20\n</Path>\n<Conclusion>\nboth\n</Conclusion>\n</Parallel>\n"
    "</Think>\nAnswer: 62"
)


def new_model(
    vocabulary: int, architecture: str = "llama", tied: bool = False, seed: int = 0
) -> MultiverseForCausalLM:
    """A float64 model that knows nothing of tags."""
    torch.manual_seed(seed)
    config = tiny_config(architecture, vocabulary, tie_word_embeddings=tied)
    return MultiverseForCausalLM(config).to(torch.float64).eval()


def matrices(model: MultiverseForCausalLM) -> dict[str, torch.Tensor]:
    """Copies of the matrices that hold a row per token."""
    named = {"input": model.get_input_embeddings().weight, "output": model.get_output_embeddings().weight}
    return {name: weight.detach().clone() for name, weight in named.items()}


def mean_of_word(weight: torch.Tensor, tag: str, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Mean of the rows of the tag's word, "Path" or "/Path"; `tokenizer` is one without tags."""
    return weight[tokenizer.encode(tag[1:-1], add_special_tokens=False)].mean(dim=0)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-12)


def state_of(model: MultiverseForCausalLM) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_state(model: MultiverseForCausalLM, expected: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert list(found) == list(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def tokenizer_with(tags: list[str], special: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(tags, special_tokens=special)
    return tokenizer


def tag_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    return set(tokenizer.convert_tokens_to_ids(list(TAGS)))


# --- Weights ---------------------------------------------------------------------------------------------------------


@every_architecture
@tied_and_untied
def test_new_rows_are_the_mean_of_the_words_rows(architecture: str, tied: bool) -> None:
    tokenizer, plain = tiny_tokenizer(), tiny_tokenizer()
    model = new_model(len(tokenizer), architecture, tied)
    before = matrices(model)
    ids = add_multiverse_tokens(model, tokenizer)
    after = matrices(model)
    assert list(ids) == list(TAGS)
    assert sorted(ids.values()) == list(range(len(plain), len(plain) + len(TAGS)))
    for name, weight in after.items():
        assert weight.shape == (len(plain) + len(TAGS), 32)
        for tag, token_id in ids.items():
            assert close(weight[token_id], mean_of_word(before[name], tag, plain)), (name, tag)


@every_architecture
@tied_and_untied
def test_rows_of_old_tokens_and_all_other_weights_stay(architecture: str, tied: bool) -> None:
    tokenizer = tiny_tokenizer()
    model = new_model(len(tokenizer), architecture, tied)
    old, before = len(tokenizer), state_of(model)
    add_multiverse_tokens(model, tokenizer)
    for name, weight in model.state_dict().items():
        kept = weight[:old] if name in ("model.embed_tokens.weight", "lm_head.weight") else weight
        assert torch.equal(kept, before[name]), name


@every_architecture
@tied_and_untied
def test_heads_stay_tied_or_untied_and_trainable(architecture: str, tied: bool) -> None:
    tokenizer = tiny_tokenizer()
    model = new_model(len(tokenizer), architecture, tied)
    ids = add_multiverse_tokens(model, tokenizer)
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (inputs is outputs) == tied
    assert torch.equal(inputs, outputs) == tied
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert model.config.vocab_size == model.vocab_size == model.lm_head.out_features == max(ids.values()) + 1
    logits = model(input_ids=torch.tensor([list(ids.values())])).logits
    assert logits.shape == (1, len(TAGS), len(tokenizer))


@tied_and_untied
def test_opening_and_closing_tags_differ(tied: bool) -> None:
    tokenizer = tiny_tokenizer()
    model = new_model(len(tokenizer), tied=tied)
    ids = add_multiverse_tokens(model, tokenizer)
    for weight in matrices(model).values():
        rows = [weight[token_id] for token_id in ids.values()]
        for number, one in enumerate(rows):
            assert all((one - other).abs().max() > 1e-3 for other in rows[:number])


@every_architecture
@tied_and_untied
def test_second_call_changes_nothing(architecture: str, tied: bool) -> None:
    tokenizer = tiny_tokenizer()
    model = new_model(len(tokenizer), architecture, tied)
    ids = add_multiverse_tokens(model, tokenizer)
    with torch.no_grad():
        # As after a training, in which the rows went their own way.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before, config, vocabulary = state_of(model), model.config.to_dict(), tokenizer.get_vocab()
    assert add_multiverse_tokens(model, tokenizer) == ids
    assert_state(model, before)
    assert model.config.to_dict() == config
    assert tokenizer.get_vocab() == vocabulary


@tied_and_untied
@pytest.mark.parametrize("special", [False, True], ids=["ordinary", "special"])
def test_tags_that_the_tokenizer_has_keep_their_rows(tied: bool, special: bool) -> None:
    known = ["</Path>", "<Goal>", "<Path>"]
    tokenizer, plain = tokenizer_with(known, special), tiny_tokenizer()
    model = new_model(len(tokenizer), tied=tied)
    old, before = len(tokenizer), matrices(model)
    known_ids = {tag: tokenizer.convert_tokens_to_ids(tag) for tag in known}
    ids = add_multiverse_tokens(model, tokenizer)
    assert ids.items() >= known_ids.items()
    assert len(tokenizer) == old + len(TAGS) - len(known)
    for name, weight in matrices(model).items():
        assert torch.equal(weight[:old], before[name])
        for tag in set(TAGS) - set(known):
            assert close(weight[ids[tag]], mean_of_word(before[name], tag, plain)), (name, tag)


@tied_and_untied
def test_model_and_tokenizer_that_come_with_all_tags_stay_as_they_are(tied: bool) -> None:
    tokenizer = tokenizer_with(list(reversed(TAGS)))
    model = new_model(len(tokenizer), tied=tied)
    before, vocabulary = state_of(model), tokenizer.get_vocab()
    ids = add_multiverse_tokens(model, tokenizer)
    assert ids == {tag: vocabulary[tag] for tag in TAGS} == model.config.multiverse_token_ids
    assert_state(model, before)
    assert tokenizer.get_vocab() == vocabulary


@tied_and_untied
def test_second_model_with_the_same_tokenizer_gets_the_same_kind_of_rows(tied: bool) -> None:
    # The tokenizer knows the tags from the first call, the second model has no rows for them yet.
    tokenizer, plain = tiny_tokenizer(), tiny_tokenizer()
    first, second = (new_model(len(plain), tied=tied, seed=seed) for seed in (0, 1))
    before = matrices(second)
    ids = add_multiverse_tokens(first, tokenizer)
    assert add_multiverse_tokens(second, tokenizer) == ids
    for name, weight in matrices(second).items():
        assert torch.equal(weight[: len(plain)], before[name])
        for tag, token_id in ids.items():
            assert close(weight[token_id], mean_of_word(before[name], tag, plain)), (name, tag)


@tied_and_untied
@pytest.mark.parametrize("spare", [12, 13, 50])
def test_matrix_with_room_to_spare_keeps_its_size(tied: bool, spare: int) -> None:
    # Qwen2.5: 151,936 rows for 151,665 tokens.
    tokenizer, plain = tiny_tokenizer(), tiny_tokenizer()
    rows = len(tokenizer) + spare
    model = new_model(rows, tied=tied)
    weights, before = model.get_input_embeddings().weight, matrices(model)
    ids = add_multiverse_tokens(model, tokenizer)
    assert model.get_input_embeddings().weight is weights
    assert model.config.vocab_size == model.vocab_size == model.lm_head.out_features == rows
    old = [row for row in range(rows) if row not in ids.values()]
    for name, weight in matrices(model).items():
        assert weight.shape[0] == rows
        assert torch.equal(weight[old], before[name][old])
        for tag, token_id in ids.items():
            assert close(weight[token_id], mean_of_word(before[name], tag, plain)), (name, tag)


@tied_and_untied
def test_matrix_with_too_little_room_grows_by_what_is_missing(tied: bool) -> None:
    tokenizer, plain = tiny_tokenizer(), tiny_tokenizer()
    model = new_model(len(tokenizer) + 5, tied=tied)
    before = matrices(model)
    ids = add_multiverse_tokens(model, tokenizer)
    for name, weight in matrices(model).items():
        assert weight.shape[0] == len(tokenizer)
        assert torch.equal(weight[: len(plain)], before[name][: len(plain)])
        for tag, token_id in ids.items():
            assert close(weight[token_id], mean_of_word(before[name], tag, plain)), (name, tag)


# --- Tokenizer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fresh", "reloaded"])
def tagged_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    tokenizer = tiny_tokenizer()
    add_multiverse_tokens(new_model(len(tokenizer)), tokenizer)
    if request.param == "fresh":
        return tokenizer
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@every_tag
@pytest.mark.parametrize(
    "frame", ["{}", "word{}word", "a {} b", "\n{}\n", "Path{}Path", "<{}>", "{0}{0}", " {0}  {0} ", "</{}", "1:{}2."]
)
def test_tag_is_one_token_in_running_text(tagged_tokenizer: PreTrainedTokenizerFast, tag: str, frame: str) -> None:
    text = frame.format(tag)
    ids = tagged_tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(tagged_tokenizer.convert_tokens_to_ids(tag)) == text.count(tag)
    assert tagged_tokenizer.decode(ids) == text
    # What stands around a tag is encoded as if the tag were a border of the text.
    pieces = [tagged_tokenizer.encode(piece, add_special_tokens=False) for piece in text.split(tag)]
    plain = [token_id for token_id in ids if token_id not in tag_ids(tagged_tokenizer)]
    assert [token_id for piece in pieces for token_id in piece] == plain


def test_decoding_without_special_tokens_keeps_the_tags(tagged_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tagged_tokenizer.encode(SAMPLE + tagged_tokenizer.eos_token, add_special_tokens=False)
    assert ids[-1] == tagged_tokenizer.eos_token_id
    assert tagged_tokenizer.decode(ids, skip_special_tokens=True) == SAMPLE
    assert tagged_tokenizer.decode(ids) == SAMPLE + tagged_tokenizer.eos_token
    assert tag_ids(tagged_tokenizer).isdisjoint(tagged_tokenizer.all_special_ids)


def test_text_without_tags_is_encoded_as_before(tagged_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<path> <Paths> < Path> Path /Path </ Path> <Parallel <|im_end|> Goal\n"
    assert tagged_tokenizer.encode(text) == tiny_tokenizer().encode(text)


# --- Configuration ---------------------------------------------------------------------------------------------------


@every_architecture
@tied_and_untied
def test_configuration_names_the_tokens_and_keeps_them(tmp_path: Path, architecture: str, tied: bool) -> None:
    tokenizer = tiny_tokenizer()
    model = new_model(len(tokenizer), architecture, tied)
    ids = add_multiverse_tokens(model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = MultiverseForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    pairs = [(model.config, tokenizer), (model.model.config, tokenizer), (loaded.config, loaded_tokenizer)]
    for config, known in pairs:
        assert config.multiverse_token_ids == ids == {tag: known.convert_tokens_to_ids(tag) for tag in TAGS}
        assert config.multiverse_separator_ids == known.encode("\n", add_special_tokens=False)
        # Two digits are two tokens here, so they are not among the pieces.
        assert set(config.multiverse_label_ids) == {*"0123456789", ".", ":"}
        for piece, token_id in config.multiverse_label_ids.items():
            assert known.encode(piece, add_special_tokens=False) == [token_id]
    assert_state(loaded, state_of(model))
    inputs = torch.tensor([tokenizer.encode(SAMPLE)])
    assert loaded_tokenizer.encode(SAMPLE) == inputs[0].tolist()
    with torch.no_grad():
        expected = model(input_ids=inputs).logits
        # Weights mapped from a file lie at other addresses, which can change the last bit of a product.
        assert close(loaded.eval()(input_ids=inputs).logits, expected)
        loaded.config.multiverse_token_ids = None
        assert (loaded(input_ids=inputs).logits - expected).abs().max() > 1e-3, "the tags had no effect"


@every_architecture
def test_tags_can_be_added_to_a_loaded_model_again(tmp_path: Path, architecture: str) -> None:
    tokenizer = tiny_tokenizer()
    model = new_model(len(tokenizer), architecture)
    ids = add_multiverse_tokens(model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = MultiverseForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    before = state_of(loaded)
    assert add_multiverse_tokens(loaded, loaded_tokenizer) == ids
    assert_state(loaded, before)


# --- What is refused -------------------------------------------------------------------------------------------------


def test_model_without_input_embeddings_raises() -> None:
    with pytest.raises(ValueError, match=r"`model` .* has no input embeddings"):
        add_multiverse_tokens(SimpleNamespace(get_input_embeddings=lambda: None), tiny_tokenizer())


def test_tokenizer_that_splits_a_tag_it_has_raises() -> None:
    # In the vocabulary, but no merge leads to it.
    state = tiny_tokenizer().backend_tokenizer.to_str()
    split = Tokenizer.from_str(state.replace('"Path":', '"<Path>":1000,"Path":', 1))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split)
    assert "<Path>" in tokenizer.get_vocab()
    with pytest.raises(ValueError, match="`tokenizer` does not encode <Path> as one token"):
        add_multiverse_tokens(new_model(1100), tokenizer)
