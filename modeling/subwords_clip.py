"""CLIP's sub-words of a word that is given as GPT-2's sub-words."""

import unicodedata
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import nn
from transformers import initialization as init

# The symbols of both vocabularies begin with the 256 bytes in this order: printable characters of Latin-1, then others.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = bytes([*_PRINTABLE, *sorted(set(range(256)) - set(_PRINTABLE))])
_SYMBOL_OF_BYTE = {byte: symbol for symbol, byte in enumerate(_BYTES)}
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


class CLIPSubwords(nn.Module):
    """
    Turns GPT-2's sub-words into CLIP's.

    A processor has one tokenizer, and ClipCap's two text models have a vocabulary each. Both are byte-level byte-pair
    encodings whose token ids follow from the order of their merges, so that the two lists of merges suffice to spell
    out GPT-2's sub-words and to encode the text for CLIP, exactly as CLIP's tokenizer does.

    Args:
        gpt_vocab_size (`int`): 256 bytes, the merges, and `<|endoftext|>`.
        clip_vocab_size (`int`): 256 bytes, 256 bytes at the end of a word, the merges, and the tokens that begin and
            end a text.
    """

    def __init__(self, gpt_vocab_size: int, clip_vocab_size: int):
        super().__init__()
        self.register_buffer("gpt_merges", torch.full((gpt_vocab_size - 257, 2), -1, dtype=torch.int32))
        self.register_buffer("clip_merges", torch.full((clip_vocab_size - 514, 2), -1, dtype=torch.int32))

    def texts(self, words: Iterable[Iterable[int]]) -> list[str]:
        """The texts of words, each given as token ids of GPT-2, without white space around them."""
        merges = self.gpt_merges.tolist()

        def spell(token: int) -> bytes:
            if token < 256:
                return _BYTES[token : token + 1]
            if token - 256 >= len(merges) or merges[token - 256][0] < 0:
                return b""  # `<|endoftext|>`, or a token that was added later
            left, right = merges[token - 256]
            return spell(left) + spell(right)

        return [b"".join(map(spell, word)).decode("utf-8", "replace").strip() for word in words]

    def encode(self, texts: Iterable[str]) -> list[list[int]]:
        """CLIP's token ids of texts, between the tokens that begin and end a text."""
        ranks = {tuple(pair): rank for rank, pair in enumerate(self.clip_merges.tolist())}
        start = 512 + len(self.clip_merges)
        seen: dict[str, list[int]] = {}
        rows = []
        for text in texts:
            ids = []
            for piece in _pieces(text):
                if piece not in seen:
                    seen[piece] = _merge(piece.encode(), ranks)
                ids += seen[piece]
            rows.append([start, *ids, start + 1])
        return rows

    def reset(self):
        """Fills the lists with no merge: every token is then one byte."""
        init.constant_(self.gpt_merges, -1)
        init.constant_(self.clip_merges, -1)


def _pieces(text: str) -> list[str]:
    """The pieces of a text that are encoded by themselves: lower-case words, single digits, punctuation."""
    text = unicodedata.normalize("NFC", text).lower()
    pieces = []
    start = 0
    while start < len(text):
        contraction = next((x for x in _CONTRACTIONS if text.startswith(x, start)), None)
        kind = _kind(text[start])
        end = start + 1
        if contraction:
            end = start + len(contraction)
        elif kind in ("letter", "other"):
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != "space":
            pieces.append(text[start:end])
        start = end
    return pieces


def _kind(character: str) -> str:
    """Whether a character is a "letter", a "number", a "space", or "other"."""
    if character.isspace():
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")


def _merge(piece: bytes, ranks: dict[tuple[int, ...], int]) -> list[int]:
    """CLIP's token ids of a piece: its bytes, with the pair of the lowest rank merged as long as there is one."""
    symbols = [_SYMBOL_OF_BYTE[byte] for byte in piece]
    symbols[-1] += 256  # ends a word
    while True:
        pairs = [pair for pair in pairwise(symbols) if pair in ranks]
        if not pairs:
            return symbols
        best = min(pairs, key=ranks.__getitem__)
        merged, index = [], 0
        while index < len(symbols):
            found = tuple(symbols[index : index + 2]) == best
            merged.append(512 + ranks[best] if found else symbols[index])
            index += 2 if found else 1
        symbols = merged


__all__ = ["CLIPSubwords"]
