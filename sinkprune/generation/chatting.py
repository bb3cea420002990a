"""Chat: messages in, an answer out, by the tokenizer's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sinkprune.generation.denoising import generate

Message = Mapping[str, str]


def chat(
    model: nn.Module,
    tokenizer: Any,
    messages: str | Sequence[Message] | Sequence[Sequence[Message]],
    **options: Any,
) -> str | list[str]:
    """What ``model`` answers to ``messages``.

    Args:
        model: of a known family, one trained to answer.
        tokenizer: of the model, with a chat template.
        messages: one conversation, ``[{"role": "user", "content": "..."}, ...]``; a string is one message of
            a user; a list of conversations runs them together.
        options: those of ``generate``. Unless ``stop_token_id`` says otherwise, an answer ends at the
            tokenizer's end-of-text token, where it has one.

    Returns:
        The answer, or a list of answers to a list of conversations.

    Raises:
        ValueError: no chat template, no message, a message that is not role and content, and what
            ``generate`` raises.
    """
    one = isinstance(messages, str) or bool(messages and isinstance(messages[0], Mapping))
    conversations: list[Any] = [messages] if one else list(messages)
    prompts = [chat_prompt(tokenizer, conversation) for conversation in conversations]
    options.setdefault("stop_token_id", end_of_text(tokenizer))
    answers = generate(model, tokenizer, prompts, **options)
    return answers[0] if one else answers


def chat_prompt(tokenizer: Any, messages: str | Sequence[Message]) -> str:
    """One conversation as the text that the model goes on from. Raises ``ValueError`` as ``chat`` says."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: generate continues plain text")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not messages:
        raise ValueError("a conversation needs at least one message, got none")
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(f"a message is {{'role': str, 'content': str}}, got {message!r:.80}")
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except Exception as error:  # whatever the template's own code raises
        raise ValueError(f"the chat template refuses these messages: {error}") from error


def end_of_text(tokenizer: Any) -> int | None:
    """The end-of-text token, None where there is none."""
    end = getattr(tokenizer, "eos_token_id", None)
    return end if isinstance(end, int) else None
