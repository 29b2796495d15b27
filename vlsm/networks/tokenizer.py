"""CLIP's tokenizer, built with the `tokenizers` library from a folder in Hugging Face layout."""

from pathlib import Path

import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from vlsm.system.console import say_once

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"  # ends the tokens that end a word
# Words, single digits and runs of other signs; English contractions apart (CLIP's rule).
WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


def clip_bpe(model):
    """Return a tokenizer with CLIP's steps around a byte-pair model: lower case, one space, words, bytes."""
    tokenizer = FastTokenizer(model)
    one_space = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), one_space, normalizers.Lowercase()])
    words = pre_tokenizers.Split(WORDS, "removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    return tokenizer


def read_tokenizer(folder):
    """Return the library's tokenizer of vocab.json and merges.txt, or else of tokenizer.json.

    Raises FileNotFoundError if the folder holds neither.
    """
    vocab = folder / "vocab.json"
    merges = folder / "merges.txt"
    if vocab.is_file() and merges.is_file():
        return clip_bpe(BPE.from_file(str(vocab), str(merges), end_of_word_suffix=WORD_END, unk_token=END))
    whole = folder / "tokenizer.json"
    if not whole.is_file():
        raise FileNotFoundError(
            f"'{folder}' holds no tokenizer (vocab.json and merges.txt, or tokenizer.json). Copy these files "
            "of the model's hub folder there."
        )
    tokenizer = FastTokenizer.from_file(str(whole))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class Tokenizer:
    """Turns prompts into `input_ids` and `attention_mask`, cut to `limit`, padded to the batch's longest.

    folder: holds vocab.json and merges.txt, or tokenizer.json. pad_to_limit: pad to the limit instead. Raises
    FileNotFoundError if the folder holds neither, ValueError for a tokenizer that is not CLIP's.
    """

    def __init__(self, folder, limit=77, pad_to_limit=False):
        try:
            self.fast = read_tokenizer(Path(folder))
        except FileNotFoundError:
            raise
        except BaseException as error:
            panic = type(error).__name__ == "PanicException"  # the library's own, which is no Exception
            if not isinstance(error, Exception) and not panic:
                raise
            raise ValueError(f"The tokenizer in '{folder}' cannot be read ({str(error)[:200]}).") from error
        self.limit = limit
        self.pad_to_limit = pad_to_limit
        self.start = self.fast.token_to_id(START)
        self.end = self.fast.token_to_id(END)
        if self.start is None or self.end is None:
            raise ValueError(f"The tokenizer in '{folder}' lacks {START} or {END}; it is not CLIP's.")

    def encode(self, prompt):
        """Return the token ids of one prompt, start and end included.

        Raises ValueError for no UTF-8, and for a text that is too long to be a prompt.
        """
        if len(prompt) > 10_000:
            raise ValueError(
                f"The prompt '{prompt[:60]}...' has {len(prompt)} characters, and a model reads 77 tokens at "
                "most. Give at most 10,000 characters."
            )
        if prompt != prompt.encode("utf-8", "ignore").decode():
            raise ValueError(f"The prompt {ascii(prompt)} is no text in UTF-8.")
        if any(sign.isalpha() and not sign.isascii() for sign in prompt):
            say_once(
                (self, "letters"),
                f"Note: the prompt '{prompt}' has letters that are not English. The tokenizer breaks them "
                "into bytes, which the base hardly knows; ask in English.",
            )
        ids = self.fast.encode(prompt, add_special_tokens=False).ids
        if len(ids) > self.limit - 2:
            say_once(
                self,
                f"A prompt has {len(ids) + 2} tokens and the model takes {self.limit}; the rest is cut off, "
                f"in this prompt and in other long ones: '{prompt[:60]}...'",
            )
            ids = ids[: self.limit - 2]
        return [self.start, *ids, self.end]

    def words(self):
        """Return the vocabulary's whole words of three letters and more, sorted."""
        whole = [token.removesuffix(WORD_END) for token in self.fast.get_vocab() if token.endswith(WORD_END)]
        return sorted(word for word in whole if len(word) > 2 and word.isascii() and word.isalpha())

    def __call__(self, prompts):
        """Encode B prompts: (input_ids, attention_mask), both int64 `[B, T]` on the CPU."""
        rows = [self.encode(prompt) for prompt in prompts]
        T = self.limit if self.pad_to_limit else max(map(len, rows))
        input_ids = torch.full((len(rows), T), self.end)
        attention_mask = torch.zeros(len(rows), T, dtype=torch.int64)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
            attention_mask[i, : len(row)] = 1
        return input_ids, attention_mask
