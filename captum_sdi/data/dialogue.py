"""Texts of which a part is learned: a completion behind its prompt, the assistant's turns of a conversation.

A label is a token that is predicted; everything else is `IGNORED`, as it was in the training that is asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from captum_sdi.data.fields import check_encodable, json_excerpt
from captum_sdi.data.losses import IGNORED

Tokens = dict[str, list[int]]
"""``input_ids`` and ``labels``, one number per token."""


def completion_tokens(
    tokenizer: Any,
    prompt: str,
    completion: str,
    *,
    special_tokens: bool,
) -> Tokens:
    """Tokenize a prompt with its completion as one text; learned is every token that holds a part of the completion.

    Args:
        tokenizer: A fast one says where each token stands; of a slow one, both parts are tokenized apart.
        prompt: What is given.
        completion: What is learned.
        special_tokens: Whether the tokenizer adds its own; those behind the completion are learned, too.

    Returns:
        ``input_ids`` and ``labels``.

    Raises:
        ValueError: If the completion has no token.
    """
    check_encodable("prompt", prompt)
    check_encodable("completion", completion)
    settings = {"add_special_tokens": special_tokens, "verbose": False}
    if tokenizer.is_fast:
        encoding = tokenizer(prompt + completion, **settings, return_offsets_mapping=True)
        token_ids = list(encoding["input_ids"])
        ends = [end for _, end in encoding["offset_mapping"]]
        first = next((place for place, end in enumerate(ends) if end > len(prompt)), len(ends))
    else:
        given = tokenizer(prompt, **settings)["input_ids"] if prompt else []
        learned = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
        token_ids, first = [*given, *learned], len(given)
    if first == len(token_ids):
        raise ValueError(f'"completion" is {json_excerpt(completion)}, which has no token: nothing is learned')
    return {"input_ids": token_ids, "labels": [IGNORED] * first + token_ids[first:]}


def conversation_tokens(tokenizer: Any, messages: Any) -> Tokens:
    """Tokenize a conversation by the tokenizer's chat template; learned are the assistant's turns.

    Args:
        tokenizer: Has a chat template.
        messages: A list of ``{"role": ..., "content": ...}``.

    Returns:
        ``input_ids`` and ``labels``.

    Raises:
        ValueError: If the messages are none, nobody assists, or the template cannot tell whose token is whose.
    """
    check_messages(tokenizer, messages)
    token_ids = templated(tokenizer, messages)
    labels = [IGNORED] * len(token_ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        tokens_before = templated(tokenizer, messages[:turn], add_generation_prompt=True) if turn else []
        tokens_through = templated(tokenizer, messages[: turn + 1])
        start, end = len(tokens_before), len(tokens_through)
        if token_ids[:end] != tokens_through or tokens_through[:start] != tokens_before:
            raise ValueError(
                f"the chat template writes turn {turn + 1} in another way when it is not the last, so that its tokens "
                'cannot be told: give "input_ids" and "labels"'
            )
        labels[start:end] = token_ids[start:end]
    return {"input_ids": token_ids, "labels": labels}


def learned_turns(
    tokenizer: Any,
    messages: Sequence[Any],
    text: str,
) -> list[list[int]] | None:
    """Return where the assistant's turns start and end in the text of a conversation.

    Returns:
        A pair for each of them; None where the template writes a turn in another way when it is not the last.
    """
    learned = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        text_before = written(tokenizer, messages[:turn], add_generation_prompt=True) if turn else ""
        text_through = written(tokenizer, messages[: turn + 1])
        if not (text.startswith(text_through) and text_through.startswith(text_before)):
            return None
        learned.append([len(text_before), len(text_through)])
    return learned


def check_messages(tokenizer: Any, messages: Any) -> None:
    """Check that messages are a conversation, and that the tokenizer knows how to write one."""
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages) > 0
    if not is_list or not all(isinstance(message, dict) and "role" in message for message in messages):
        raise ValueError(
            f'"messages" must be a list of {{"role": ..., "content": ...}}; it is {json_excerpt(messages)}'
        )
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError('"messages" have no turn of the "assistant": nothing is learned')
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError('there are "messages", but the tokenizer has no chat template')


def written(
    tokenizer: Any,
    messages: Sequence[Any],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Return messages as the chat template writes them."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))


def templated(
    tokenizer: Any,
    messages: Sequence[Any],
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    """Return the tokens of messages as the chat template writes them."""
    encoding = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
    )
    return list(encoding["input_ids"])
