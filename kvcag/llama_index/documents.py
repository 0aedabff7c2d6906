"""Where a LlamaIndex template has its context, documents are put: one block each, not one joined string."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.base.llms.types import ChatMessage, ContentBlock, TextBlock

from kvcag.llama_index.messages import document_blocks

CONTEXT = "kvcag-context-7d2f90c1"
"""Stands in a rendered template where the documents go."""


def place(messages: Sequence[ChatMessage], texts: Sequence[str], *, exact: bool = False) -> list[ChatMessage]:
    """The messages with the documents in the place of `CONTEXT`.

    Documents are cached at the first place; where a template shows its context again, they stand as plain text. The
    line breaks around the place are those between the blocks. `exact` makes them one segment, see `document_blocks`.
    """
    placed: list[ChatMessage] = []
    pending = True
    for message in messages:
        blocks: list[ContentBlock] = []
        for block in message.blocks:
            if not isinstance(block, TextBlock) or CONTEXT not in block.text:
                blocks.append(block)
                continue
            if pending:
                before, _, rest = block.text.partition(CONTEXT)
                after = rest.removeprefix("\n").replace(CONTEXT, "\n\n".join(texts))
                blocks += [TextBlock(text=before.removesuffix("\n"))] if before else []
                blocks += document_blocks(texts, exact=exact)
                blocks += [TextBlock(text=after)] if after else []
                pending = False
            else:
                blocks.append(TextBlock(text=block.text.replace(CONTEXT, "\n\n".join(texts))))
        placed.append(message.model_copy(update={"blocks": blocks}))
    return placed
