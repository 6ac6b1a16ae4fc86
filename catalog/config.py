"""What to train on."""

from dataclasses import dataclass, field


@dataclass
class GeneratedConfig:
    """The embedded catalogue: generated, so that the best possible ranking is known."""

    items: int = 400
    """Number of items."""
    users: int = 2400
    """Number of users; each contributes a sequence of interactions."""
    duplicates: float = 0.01
    """Share of items that bear the title of another item, as some do in real catalogues."""
    seed: int = 0
    """Seed of titles, preferences and transitions."""


@dataclass
class TemplateConfig:
    """How a history and a title become text. The defaults are the published prompt."""

    prompt: str = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request. \n\n### Instruction:\n"
        "Can you predict the next item that the user may expect, given the items the user interacted with before?\n"
        " \n### User Input: \nThe user has interacted with the following items before: {history}\n\n### Response:\n"
    )
    """Text of a prompt; {history} is replaced by the titles."""
    item: str = '"{title}"'
    """Text of one title in the history."""
    separator: str = ",\t"
    """Between two titles of the history."""
    response: str = '"{title}"\n'
    """Text that the model must generate for a title; end-of-sequence follows."""


@dataclass
class DataConfig:
    """Where items and examples come from."""

    path: str | None = None
    """Folder in one of the three formats of docs/catalog.md; null: the generated catalogue."""
    cache: str = ".cache/catalog"
    """Folder of built catalogues, one per fingerprint of data, tokenizer and template, and of fresh models."""
    max_history: int = 10
    """Most recent titles of a user that a prompt shows."""
    max_prompt_tokens: int = 512
    """Longer prompts lose their first tokens, as in the published code; the number of them is reported."""
    generated: GeneratedConfig = field(default_factory=GeneratedConfig)
    """Shape of the generated catalogue."""
    template: TemplateConfig = field(default_factory=TemplateConfig)
    """Text of prompts and titles."""
