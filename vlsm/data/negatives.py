"""Negatives: prompts of what is not in an image, whose masks are empty.

Tuned on right prompts alone, a model ignores the text and segments the image. CLIPSeg's released weights
were trained with a fifth of negatives; both papers' recipes have none. A word that no prompt uses may still
name what is in the images (a synonym); among thousands of words that is rare.
"""

import re
from collections import defaultdict

import numpy as np
import torch

from vlsm.data.describe import ATTRIBUTES
from vlsm.data.images import IGNORED
from vlsm.data.records import choose_prompt, prompt_texts
from vlsm.system.files import hash_of

ABSENT_CLASS = 0.5  # share of the negatives that name an absent class, where there is one
IN_PROMPT = 0.25  # of the negatives that are a word: share put into the right prompt, for its class word
HELD_OUT = 5  # one word in five is kept for evaluation and never trained on
ABSENT_SETS = ("absent class", "absent word", "absent word in the prompt")  # that evaluation asks for


def unused_words(vocabulary, records, texts=(), held_out=False):
    """Return the words of a vocabulary that no prompt of the records uses, and none of other `texts`.

    Colours, numbers, places and sizes are left out, too: they may well be there. held_out: the words that
    only evaluation asks for, a fifth by a hash of the word; else those for training.
    """
    texts = [*texts, *ATTRIBUTES]
    for record in records:
        texts += [record.class_word or "", *prompt_texts(record)]
    used = set()
    for text in texts:
        used.update(map(_singular, re.findall(r"[^\W_]+", text.casefold())))
    words = []
    for word in vocabulary:
        is_held_out = hash_of(word) % HELD_OUT == 0
        if is_held_out == held_out and _singular(word) not in used:
            words.append(word)
    return words


def _singular(word):
    return word.removesuffix("s")


class Negatives:
    """Draws the right prompts of records, and beside them prompts of what is not in their images.

    records: of a split. mode: of their right prompts, as `choose_prompt` takes it. words: those that may be
    drawn. count: of negatives for each right prompt. Attribute `right`: the rows of right prompts in what
    `prompts` and `beside` return.
    """

    def __init__(self, records, mode, words, count=1):
        self.records = records
        self.mode = mode
        self.words = words
        self.count = count
        self.right = slice(None, None, 1 + count)
        self.texts_of = {}
        if count:
            prompts = [choose_prompt(record, mode, i) for i, record in enumerate(records)]
            self.texts_of = _texts_by_class(records, prompts)

    def prompts(self, parts, *seed):
        """Yield the prompts of each list of record indices: right ones, each followed by its negatives."""
        for indices in parts:
            right = [choose_prompt(self.records[i], self.mode, *seed, i) for i in indices]
            yield self.beside(right, indices, *seed)

    def beside(self, prompts, indices, *seed):
        """Return records' right prompts, each followed by its negatives; equal seeds draw equal ones."""
        texts = []
        for i, prompt in zip(indices, prompts):
            texts.append(prompt)
            for k in range(self.count):
                # from 1 on: a seed that ends with 0 gives the numbers that chose the right prompt
                texts.append(self.draw(self.records[i], prompt, np.random.default_rng([*seed, i, 1 + k])))
        return texts

    def draw(self, record, prompt, rng):
        """Return an absent class's prompt for a record, or a word, alone or in the right prompt."""
        if record.absent and rng.random() < ABSENT_CLASS:
            return _absent_class_text(record, prompt, self.texts_of, rng)
        word = self.words[rng.integers(len(self.words))]
        return in_place_of_class(record, prompt, word) if rng.random() < IN_PROMPT else word


def absent_prompts(records, prompts, words, seed=0):
    """Return {name in `ABSENT_SETS`: a text for each record, or None}: prompts of what is not in the images.

    prompts: the records' right ones. words: those that training never drew. There is None for a
    record without an absent class, and without any words.
    """
    rng = np.random.default_rng(seed)
    texts_of = _texts_by_class(records, prompts)
    rows = []
    for record, prompt in zip(records, prompts):
        of_class = _absent_class_text(record, prompt, texts_of, rng) if record.absent else None
        word = words[rng.integers(len(words))] if words else None
        rows.append((of_class, word, word and in_place_of_class(record, prompt, word)))
    return dict(zip(ABSENT_SETS, map(list, zip(*rows))))


def _texts_by_class(records, prompts):
    """Return {class word: prompts of its records}."""
    texts_of = defaultdict(list)
    for record, prompt in zip(records, prompts):
        texts_of[record.class_word].append(prompt)
    return texts_of


def _absent_class_text(record, prompt, texts_of, rng):
    """Return a prompt of a class that is absent from a record; its word, if the class has the same prompt."""
    word = record.absent[rng.integers(len(record.absent))]
    texts = texts_of[word] or [word]
    text = texts[rng.integers(len(texts))]
    return word if text == prompt else text


def in_place_of_class(record, prompt, word):
    """Return the prompt with `word` for the class word, or its plural; `word` alone if it names no class.

    In the prompt of a record without a class word, the last word is taken for it.
    """
    name = rf"{re.escape(record.class_word)}s?" if record.class_word else r"\w+(?=\W*$)"
    replaced, count = re.subn(rf"(?<!\w){name}(?!\w)", word, prompt, flags=re.I)
    return replaced if count else word


def add_empty_masks(masks, count):
    """Return masks uint8 `[B, 1, S, S]`, each followed by `count` empty ones; ignored pixels stay ignored."""
    empty = torch.where(masks == IGNORED, masks, 0)
    return torch.stack([masks, *[empty] * count], 1).flatten(0, 1)
