"""Histories as prompt tokens: a title recurs in many histories, so its tokens are computed once for each place."""

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from catalog.config import TemplateConfig
from catalog.ragged import Ragged
from catalog.template import prompt_texts
from catalog.tokenizer import Report, counted, encode_batch, encode_prompts, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIAL_TITLES, TRIAL_HISTORY = 64, 10
SHOWN_AT_ONCE = 1 << 18
"""Titles of the histories whose prompts are made at once."""


def history_texts(template: TemplateConfig, titles: list[str], histories: Ragged) -> list[str]:
    """The prompts as text. histories: rows of `titles`, oldest first."""
    rows = histories.flat.tolist()
    shown = ([titles[row] for row in rows[first:end]] for first, end in pairwise(histories.start.tolist()))
    return prompt_texts(template, shown)


class PromptEncoder:
    """Tokens of the prompts of one template over the titles of one catalogue.

    Between two titles a prompt has a constant text. Where the tokenizer always ends a token at some place in it, what
    stands before and behind that place can be encoded apart. The place is one where the tokenizer splits texts before
    it looks for tokens, and each title is tried on both sides of it; a template or tokenizer without such a place has
    its prompts encoded whole.

    >>> encoder = PromptEncoder(tokenizer, template, titles)
    >>> encoder.encode(histories)           # Ragged of item classes in, Ragged of tokens out
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: TemplateConfig,
        titles: list[str],
        report: Report = silent,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.titles = titles
        self._report = report
        self._pieces = self._pieces_of_all_titles()

    def texts(self, histories: Ragged) -> list[str]:
        """The prompts as text. histories: item classes, oldest first."""
        return history_texts(self.template, self.titles, histories)

    def batches(self, histories: Ragged) -> Iterator[Ragged]:
        """`encode` of consecutive histories, SHOWN_AT_ONCE titles at a time, to bound the memory that it takes."""
        first = 0
        while first < len(histories):
            self._report(f"prompts: {first:,} of {len(histories):,}")
            fit = int(np.searchsorted(histories.start, histories.start[first] + SHOWN_AT_ONCE, side="right")) - 1
            end = max(fit, first + 1)
            yield self.encode(histories.take(np.arange(first, end)))
            first = end

    def encode(self, histories: Ragged) -> Ragged:
        """The prompts as tokens. histories: item classes, oldest first, at least one each."""
        if self._pieces is None:
            return encode_prompts(self.tokenizer, self.texts(histories))
        return _join(self._pieces, histories)

    def _pieces_of_all_titles(self) -> Ragged | None:
        for cut in range(1, len(_joint(self.template))):
            if self._splits_at(cut) and self._pieces_at(cut, self.titles[:TRIAL_TITLES]):
                return self._pieces_at(cut, self.titles)
        return None

    def _splits_at(self, cut: int) -> bool:
        """Whether no token can reach over this place of the joint, whatever stands around it, by some titles."""
        pre_tokenizer, joint = self.tokenizer.backend_tokenizer.pre_tokenizer, _joint(self.template)
        some = self.titles[:TRIAL_TITLES]
        return pre_tokenizer is not None and all(
            any(end == len(left) + cut for _, (_, end) in pre_tokenizer.pre_tokenize_str(left + joint + right))
            for left, right in zip(some, some[::-1], strict=True)
        )

    def _pieces_at(self, cut: int, titles: list[str]) -> Ragged | None:
        """Tokens of each of C titles as the only one, the first, one between and the last: 4 C lists.

        None unless joined pieces equal whole prompts in which every title follows and precedes another.
        """
        head, _, end = self.template.prompt.partition("{history}")
        before, _, behind = self.template.item.partition("{title}")
        left, right = _joint(self.template)[:cut], _joint(self.template)[cut:]
        starts = (head + before + title + last for last in (behind + end, left) for title in titles)
        others = (right + title + last for last in (left, behind + end) for title in titles)
        twice = 2 * len(titles)
        first = encode_prompts(self.tokenizer, counted(starts, "titles that begin a history", twice, self._report))
        later = encode_batch(self.tokenizer, counted(others, "titles that go on with it", twice, self._report))
        pieces = Ragged.concatenate([first, later])
        for trial in _chains(len(titles)):
            whole, joined = encode_prompts(self.tokenizer, self.texts(trial)), _join(pieces, trial)
            if not (np.array_equal(whole.flat, joined.flat) and np.array_equal(whole.start, joined.start)):
                return None
        return pieces


def _joint(template: TemplateConfig) -> str:
    """The constant text between two titles of a history."""
    before, _, behind = template.item.partition("{title}")
    return behind + template.separator + before


def _chains(titles: int) -> Iterator[Ragged]:
    """Histories in which every title follows another one and precedes another one (itself, if there is one only).

    About SHOWN_AT_ONCE titles at a time.
    """
    starts = np.arange(0, titles, TRIAL_HISTORY - 1)
    rows = SHOWN_AT_ONCE // TRIAL_HISTORY
    for first in range(0, len(starts), rows):
        shown = (starts[first : first + rows, None] + np.arange(TRIAL_HISTORY)) % titles
        yield Ragged.from_lengths(shown.ravel().astype(np.int32), np.full(len(shown), TRIAL_HISTORY))


def _join(pieces: Ragged, histories: Ragged) -> Ragged:
    """Whole prompts from the 4 C pieces of C titles; histories of classes."""
    first, last = np.zeros((2, len(histories.flat)), bool)
    first[histories.start[:-1]] = True
    last[histories.start[1:] - 1] = True
    place = np.select([first & last, first, last], [0, 1, 3], 2)
    tokens = pieces.take(place * (len(pieces) // 4) + histories.flat)
    return Ragged(tokens.flat, tokens.start[histories.start])
