"""CLIP's tokenizer, from a folder in Hugging Face layout, on the `tokenizers` library."""

import sys
from pathlib import Path

import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

START, END = "<|startoftext|>", "<|endoftext|>"
# Words, single digits and runs of other signs; English contractions apart (CLIP's rule).
WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


def clip_bpe(model):
    """Return a tokenizer with CLIP's steps around a byte-pair model: lower case, one space, words, bytes."""
    tokenizer = FastTokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _read(vocab, merges, whole):
    """Return the library's tokenizer of vocab.json and merges.txt, or else of tokenizer.json."""
    if vocab.is_file() and merges.is_file():
        return clip_bpe(BPE.from_file(str(vocab), str(merges), end_of_word_suffix="</w>", unk_token=END))
    tokenizer = FastTokenizer.from_file(str(whole))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class Tokenizer:
    """Prompts to `input_ids` and `attention_mask`, padded to the longest of the batch, cut to `limit` tokens.

    folder: holds vocab.json and merges.txt, or tokenizer.json. pad_to_limit: pad to the limit instead. Raises
    FileNotFoundError where the folder holds neither, ValueError for a tokenizer that is not CLIP's.
    """

    def __init__(self, folder, limit=77, pad_to_limit=False):
        folder = Path(folder)
        vocab, merges, whole = folder / "vocab.json", folder / "merges.txt", folder / "tokenizer.json"
        if (vocab.is_file() and merges.is_file()) or whole.is_file():
            try:
                self.fast = _read(vocab, merges, whole)
            except Exception as error:  # the library raises plain ones
                raise ValueError(
                    f"The tokenizer in '{folder}' cannot be read ({str(error)[:200]})."
                ) from error
        else:
            raise FileNotFoundError(
                f"'{folder}' holds no tokenizer (vocab.json and merges.txt, or tokenizer.json). "
                "Copy these files of the model's hub folder there."
            )
        self.limit, self.pad_to_limit = limit, pad_to_limit
        self.start, self.end = self.fast.token_to_id(START), self.fast.token_to_id(END)
        if self.start is None or self.end is None:
            raise ValueError(f"The tokenizer in '{folder}' lacks {START} or {END}; it is not CLIP's.")
        self.warned = False  # about a prompt that is too long

    def encode(self, prompt):
        """Return the token ids of one prompt, start and end included. Raises ValueError for no UTF-8."""
        if not prompt.isascii() and prompt != prompt.encode("utf-8", "ignore").decode():
            raise ValueError(f"The prompt {ascii(prompt)} is no text in UTF-8.")
        ids = self.fast.encode(prompt, add_special_tokens=False).ids
        if len(ids) > self.limit - 2:
            if not self.warned:
                print(
                    f"A prompt has {len(ids) + 2} tokens and the model takes {self.limit}; the rest is cut "
                    f"off, here and wherever one is too long: '{prompt[:60]}...'",
                    file=sys.stderr,
                )
            self.warned = True
            ids = ids[: self.limit - 2]
        return [self.start, *ids, self.end]

    def __call__(self, prompts):
        """Encode B prompts: (input_ids, attention_mask), both int64 `[B, T]` on the CPU."""
        rows = [self.encode(p) for p in prompts]
        T = self.limit if self.pad_to_limit else max(map(len, rows))
        ids = torch.tensor([row + [self.end] * (T - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])
        return ids, mask
