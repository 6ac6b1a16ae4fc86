"""Whether prompts and titles, tokenised apart, are the tokens of their texts joined."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from catalog.errors import CatalogError
from catalog.ragged import Ragged
from catalog.tokenizer import encode_batch, encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_prompt_ends(tokenizer: "PreTrainedTokenizerBase", context: str, prompts: Ragged) -> None:
    """Raise CatalogError unless all prompts end in the same tokens of `context`, on which the titles' tokens rest.

    The first tokens of the context may merge with the history before it; a token boundary inside it must remain.
    """
    tail = encode_batch(tokenizer, [context])[0]
    shared = len(tail)
    ends = prompts.last(len(tail))
    for back in range(1, len(tail) + 1):
        reaches = ends.lengths >= back
        if not (reaches.all() and (ends.flat[ends.start[1:] - back] == tail[-back]).all()):
            shared = back - 1
            break
    if not shared:
        raise CatalogError(
            f"the text behind {{history}} in data.template.prompt, {context!r}, has no token of its own in every "
            "prompt; end data.template.prompt with a fixed marker such as '### Response:\\n'"
        )


def check_titles_follow(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    prompt_tokens: Ragged,
    responses: Sequence[str],
    title_tokens: Ragged,
) -> None:
    """Raise CatalogError unless prompt + title is prompt tokens + title tokens, for each prompt with some title.

    prompts and prompt_tokens go together, and so do responses and title_tokens (end-of-sequence last).
    """
    titles = [i * 31 % len(responses) for i in range(len(prompts))]
    whole = encode_prompts(
        tokenizer, [prompt + responses[title] for prompt, title in zip(prompts, titles, strict=True)]
    )
    for i, title in enumerate(titles):
        if not np.array_equal(whole[i], np.concatenate([prompt_tokens[i], title_tokens[title][:-1]])):
            raise CatalogError(
                f"the tokenizer does not keep the title {responses[title]!r} apart from the prompt {prompts[i]!r}; "
                "end data.template.prompt with a fixed marker such as '### Response:\\n'"
            )
