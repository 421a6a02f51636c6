"""Texts of which a part is learned: a completion behind its prompt, the assistant's turns of a conversation.

A label is a token that is predicted; everything else is `IGNORED`, as it was in the training that is asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
    """Tokenize a conversation by the tokenizer's chat template; learned are the tokens that hold a part of an answer.

    Args:
        tokenizer: Has a chat template. A fast one says where each token stands.
        messages: A list of ``{"role": ..., "content": ...}``.

    Returns:
        ``input_ids`` and ``labels``.

    Raises:
        ValueError: If the messages are none, nobody assists, or the template cannot tell whose token is whose.
    """
    check_messages(tokenizer, messages)
    token_ids = templated(tokenizer, messages)
    places = token_places(tokenizer, written(tokenizer, messages), token_ids)
    if places is None:  # turns are told apart by the tokens of the conversation so far
        places = [(token, token + 1) for token in range(len(token_ids))]
        turns = assistant_turns(messages, token_ids, partial(templated, tokenizer))
    else:
        turns = learned_turns(tokenizer, messages)
    labels = [IGNORED] * len(token_ids)
    for turn_start, turn_end in turns:
        for token, (start, end) in enumerate(places):
            if start < turn_end and end > turn_start:
                labels[token] = token_ids[token]
    return {"input_ids": token_ids, "labels": labels}


def token_places(tokenizer: Any, text: str, token_ids: list[int]) -> list[tuple[int, int]] | None:
    """Return where each token of a text starts and ends; None where the tokenizer does not say."""
    if not tokenizer.is_fast:
        return None
    encoding = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    is_same = list(encoding["input_ids"]) == token_ids
    return encoding["offset_mapping"] if is_same else None


def learned_turns(tokenizer: Any, messages: Sequence[Any]) -> list[list[int]]:
    """Return which characters of a conversation are the assistant's, as `assistant_turns` does.

    Raises:
        ValueError: If they cannot be told.
    """
    write = partial(written, tokenizer)
    return assistant_turns(messages, write(messages), write)


def assistant_turns(
    messages: Sequence[Any],
    whole: Sequence[Any],
    write: Callable[..., Sequence[Any]],
) -> list[list[int]]:
    """Return where the assistant's turns start and end in a conversation.

    Args:
        messages: The conversation.
        whole: Its characters, or its tokens.
        write: Makes characters or tokens of messages; with ``add_generation_prompt``, to where an answer begins.

    Returns:
        A pair for each turn of the assistant.

    Raises:
        ValueError: If a part of the conversation is not how the whole begins.
    """
    turns = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = write(messages[:number], add_generation_prompt=True) if number else whole[:0]
        through = write(messages[: number + 1])
        if whole[: len(through)] != through or through[: len(before)] != before:
            raise ValueError(
                f"the chat template writes turn {number + 1} in another way when it is not the last, so that its "
                'tokens cannot be told: give "input_ids" and "labels"'
            )
        turns.append([len(before), len(through)])
    return turns


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
