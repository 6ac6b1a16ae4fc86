"""Histories and titles as text."""

from collections.abc import Iterable, Sequence

from catalog.config import TemplateConfig
from catalog.errors import CatalogError


def check_template(template: TemplateConfig) -> None:
    """Raise CatalogError unless each text has its placeholder exactly once."""
    for name, text, placeholder in (
        ("prompt", template.prompt, "{history}"),
        ("item", template.item, "{title}"),
        ("response", template.response, "{title}"),
    ):
        if text.count(placeholder) != 1:
            raise CatalogError(f"data.template.{name} must contain {placeholder} exactly once, it is {text!r}")


def prompt_end(template: TemplateConfig) -> str:
    """The constant text behind the history, in whose context titles are tokenised."""
    return template.prompt.partition("{history}")[2]


def prompt_texts(template: TemplateConfig, histories: Iterable[Sequence[str]]) -> list[str]:
    """One prompt per history of titles."""
    head, _, end = template.prompt.partition("{history}")
    before, _, behind = template.item.partition("{title}")
    between = behind + template.separator + before
    return [head + before + between.join(titles) + behind + end for titles in histories]


def response_texts(template: TemplateConfig, titles: Sequence[str]) -> list[str]:
    """What the policy generates for each title, before end-of-sequence."""
    before, _, behind = template.response.partition("{title}")
    return [before + title + behind for title in titles]
