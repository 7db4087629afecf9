"""Conversations as text: a checkpoint's own chat template, applied as transformers applies it (in its sandbox)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported
from tightship.texts import codec_of, library_tokenizer

Message = dict[str, Any]


def chat_renderer(checkpoint: Checkpoint) -> Callable[[Sequence[Message]], str]:
    """A function from messages (`role`, `content`) to the text that the model was trained on.

    Special tokens that the tokenizer itself puts in front of every text are left out at the start, so that they do not
    stand there twice.

    Raises:
        Unsupported: the checkpoint has no tokenizer or no chat template.
        Malformed (by the function): the template refuses the messages.
    """
    from jinja2 import TemplateError

    tokenizer = library_tokenizer(checkpoint)
    if not tokenizer.chat_template:
        raise Unsupported(
            f"{checkpoint.name} has no chat template, and the text holds `messages`",
            hint="put chat_template.jinja beside the weights, or give lines with `text`",
        )
    prefix = "".join(tokenizer.convert_ids_to_tokens(list(codec_of(checkpoint).before)))

    def render(messages: Sequence[Message]) -> str:
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise Malformed(f"the chat template refuses a conversation: {str(error)[:200]}") from error
        return str(text).removeprefix(prefix)

    return render
