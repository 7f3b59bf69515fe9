"""How many characters of the original text a token stands for, for bits per character."""

from typing import Any

import torch
from torch import Tensor

TOKEN_UNITS = ("auto", "character", "word")


def characters_per_token(dictionary: Any, unit: str = "auto") -> Tensor:
    """(V,) float64: the characters that each entry of a fairseq dictionary stands for.

    character  every token is one character (or byte), the end of a line too
    word       a word and the space or line end behind it; the end-of-line token itself is nothing more. A part of a
               word that ends in @@ (byte pair encoding) is its letters. <unk> counts as the five letters it is in
               WikiText; where it stands for words that fairseq-preprocess did not know, the number is too low
    auto       character when every symbol of the dictionary is one character long, else word

    Padding, and what fairseq-preprocess adds to fill the dictionary up, stands for nothing.
    """
    symbols = [dictionary[index] for index in range(len(dictionary))]
    real = [
        index >= dictionary.nspecial and not symbol.startswith("madeupword") for index, symbol in enumerate(symbols)
    ]
    if unit == "auto":
        unit = "character" if all(len(s) == 1 for s, is_real in zip(symbols, real) if is_real) else "word"
    if unit == "character":
        lengths = [float(is_real) for is_real in real]
        lengths[dictionary.eos()] = 1.0
        lengths[dictionary.unk()] = 1.0
    else:
        lengths = [is_real * _word_length(symbol) for symbol, is_real in zip(symbols, real)]
        lengths[dictionary.unk()] = len(symbols[dictionary.unk()]) + 1.0
    return torch.tensor(lengths, dtype=torch.float64)


def _word_length(symbol: str) -> float:
    return len(symbol) - 2.0 if symbol.endswith("@@") else len(symbol) + 1.0
