"""From words to tokens and labels: which tokens are learned, what is remembered, and what cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import captum_sdi
from captum_sdi.data.losses import IGNORED

WORDS = ["[BOS]", "[EOS]", "user:", "assistant:", "system:", *"abcdefgh", "ab"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}[EOS] {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETFUL = "{{ messages|length }} " + TEMPLATE  # writes a beginning that depends on the end


def make_tokenizer(*, template: str | None = TEMPLATE, ends: bool = True) -> PreTrainedTokenizerFast:
    ids = {word: number for number, word in enumerate([*WORDS, "1", "2", "3", "4"])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[BOS]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 0), ("[EOS]", 1)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[BOS]", eos_token="[EOS]")
    fast.chat_template = template
    return fast


def learned(row: dict[str, Any]) -> list[str]:
    """The words that are predicted."""
    return [[*WORDS, "1", "2", "3", "4"][label] for label in row["labels"].tolist() if label != IGNORED]


def test_of_a_completion_its_tokens_are_learned() -> None:
    data = captum_sdi.texts([{"prompt": "a b ", "completion": "c d"}], make_tokenizer())
    assert data[0]["input_ids"].tolist() == [0, 5, 6, 7, 8, 1]
    assert learned(data[0]) == ["c", "d", "[EOS]"]  # what the tokenizer puts behind it, too
    blank_behind = captum_sdi.texts([{"prompt": "a b", "completion": " c d"}], make_tokenizer())
    assert torch.equal(blank_behind[0]["labels"], data[0]["labels"])
    bare = captum_sdi.texts([{"prompt": "", "completion": "c d"}], make_tokenizer(), special_tokens=False)
    assert learned(bare[0]) == ["c", "d"]


def test_a_token_of_both_prompt_and_completion_is_learned() -> None:
    data = captum_sdi.texts([{"prompt": "a a", "completion": "b c"}], make_tokenizer(ends=False))
    assert data[0]["input_ids"].tolist() == [5, 13, 7]
    assert learned(data[0]) == ["ab", "c"]


def test_of_a_slow_tokenizer_both_parts_are_tokenized_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(ends=False)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    data = captum_sdi.texts([{"prompt": "a a", "completion": "b c"}], tokenizer)
    assert data[0]["input_ids"].tolist() == [5, 5, 6, 7]
    assert learned(data[0]) == ["b", "c"]


def test_of_a_conversation_the_assistants_turns_are_learned() -> None:
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f g"},
    ]
    data = captum_sdi.texts([{"messages": messages, "id": "m"}], make_tokenizer(ends=False))
    assert learned(data[0]) == ["d", "[EOS]", "f", "g", "[EOS]"]
    text = "system: a user: b c assistant: d [EOS] user: e assistant: f g [EOS] "
    assert data.example(0) == {"id": "m", "text": text, "learned_characters": [[31, 39], [58, 68]]}
    assert [text[31:39], text[58:68]] == ["d [EOS] ", "f g [EOS] "]
    with pytest.raises(ValueError, match=r"rows\[0\]: the chat template writes turn 3 in another way when it is not"):
        captum_sdi.texts([{"messages": messages}], make_tokenizer(template=FORGETFUL, ends=False))


@pytest.mark.parametrize("is_fast", [True, False])
def test_slow_and_fast_tokenizers_agree_on_a_conversation(is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(ends=False)
    monkeypatch.setattr(type(tokenizer), "is_fast", is_fast)
    turns = [("user", "a b"), ("assistant", "c"), ("user", "d"), ("assistant", "e f")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert learned(captum_sdi.texts([{"messages": messages}], tokenizer)[0]) == ["c", "[EOS]", "e", "f", "[EOS]"]


def test_an_answer_whose_blank_stands_in_the_template_is_learned_whole() -> None:
    """A byte pair tokenizer writes the blank before an answer and its first word as one token."""
    said = ["user: a b", "assistant: c"]
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.train_from_iterator(said * 9, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, chat_template=TEMPLATE.replace("[EOS] ", "\n"))
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    row = captum_sdi.texts([{"messages": messages}], tokenizer)[0]
    answer = [label for label in row["labels"].tolist() if label != IGNORED]
    assert tokenizer.convert_ids_to_tokens(answer)[0] == "Ġc"


def test_words_are_remembered_and_what_is_cut_is_said() -> None:
    rows = ["a b c d e", {"prompt": "a b c ", "completion": "d", "id": 7}, {"input_ids": [5, 6], "labels": [5, 6]}]
    data = captum_sdi.texts(rows, make_tokenizer(ends=False), max_length=3)
    answer = {"text": "a b c d", "id": 7, "learned_characters": [[6, 7]]}
    assert data.examples == [{"text": "a b c d e"}, answer, {"text": "a b"}]
    assert repr(data) == (
        "Texts of 3 examples; 2 cut to 3 tokens; 1 in which nothing is predicted: their influence is zero"
    )
    assert [len(data[place]["input_ids"]) for place in range(3)] == [3, 3, 2]
    assert torch.equal(data[0]["labels"], data[0]["input_ids"])


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (7, "a line must be a JSON object"),
        ({"prompt": "a"}, '"prompt" comes without "completion"'),
        ({"completion": "a"}, '"completion" comes without "prompt"'),
        ({"prompt": "a", "completion": 7}, '"completion" is 7'),
        ({"prompt": "a", "completion": ""}, "which has no token: nothing is learned"),
        ({"prompt": "a", "completion": "\ud800"}, '"completion" holds half of a surrogate pair at character 0'),
        ({"text": "a", "messages": []}, 'there are "text" and "messages": which is meant'),
        ({"messages": "a"}, '"messages" must be a list'),
        ({"messages": []}, '"messages" must be a list'),
        ({"messages": [{"role": "user", "content": "a"}]}, 'no turn of the "assistant"'),
        ({"prompt": "a", "completion": "b", "labels": [1]}, '"labels" are one per token'),
    ],
)
def test_what_cannot_be_meant_is_named(row: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"rows\[1\]: .*{sentence}"):
        captum_sdi.texts(["a", row], make_tokenizer(ends=False))


def test_a_conversation_needs_a_template() -> None:
    row = {"messages": [{"role": "assistant", "content": "a"}]}
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        captum_sdi.texts([row], make_tokenizer(template=None))
    with pytest.raises(TypeError, match="rows must be a list of texts or of mappings, got one str"):
        captum_sdi.texts("a b", make_tokenizer())


@pytest.mark.parametrize(
    ("rows", "tokenizer", "max_length", "sentence"),
    [
        ({"a b"}, None, None, "rows must be a list of texts or of mappings, in their order, got set"),
        ((text for text in ["a"]), None, None, "in their order, got generator"),
        (["a"], "gpt2", None, "tokenizer must be one of transformers.*got 'gpt2'"),
        *((["a"], None, length, "max_length must be an int of at least 1") for length in (0, -1, 2.5, True)),
    ],
)
def test_what_has_no_order_and_no_length_is_named(rows: Any, tokenizer: Any, max_length: Any, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        captum_sdi.texts(rows, tokenizer or make_tokenizer(), max_length=max_length)
