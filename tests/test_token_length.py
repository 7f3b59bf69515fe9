import pytest

from fairseq_hyperrouter.token_length import TOKEN_UNITS, characters_per_token
from tests.tiny import tiny_dictionary

SPECIAL = {"<s>": 0, "<pad>": 0}
CHARACTER = {**SPECIAL, "</s>": 1, "<unk>": 1}
WORD = {**SPECIAL, "</s>": 0, "<unk>": 6}


def lengths(symbols, unit):
    dictionary = tiny_dictionary(symbols)
    return dict(zip(dictionary.symbols, characters_per_token(dictionary, unit).tolist()))


@pytest.mark.parametrize(
    "symbols, unit, expected",
    [
        (["a", "é", "▁"], "character", {**CHARACTER, "a": 1, "é": 1, "▁": 1}),
        (["97", "101"], "character", {**CHARACTER, "97": 1, "101": 1}),
        (["a", "the", "naïve"], "word", {**WORD, "a": 2, "the": 4, "naïve": 6}),
        (["a", "b"], "auto", {**CHARACTER, "a": 1, "b": 1}),
        (["a", "of"], "auto", {**WORD, "a": 2, "of": 3}),
        (["a", "madeupword0000"], "auto", {**CHARACTER, "a": 1, "madeupword0000": 0}),
        (["low@@", "er"], "auto", {**WORD, "low@@": 3, "er": 3}),
        (["of", "madeupword0000"], "word", {**WORD, "of": 3, "madeupword0000": 0}),
    ],
)
def test_characters_per_token(symbols, unit, expected):
    assert unit in TOKEN_UNITS
    assert lengths(symbols, unit) == expected


def test_what_fairseq_pads_a_dictionary_with_is_nothing():
    dictionary = tiny_dictionary("abc")
    dictionary.finalize(padding_factor=8)
    assert len(dictionary) == 8
    assert characters_per_token(dictionary).tolist() == [0, 0, 1, 1, 1, 1, 1, 0]


def test_a_line_has_as_many_characters_in_both_units():
    characters, words = (tiny_dictionary(symbols) for symbols in ("the cat".replace(" ", "▁"), ["the", "cat"]))
    by_character = characters_per_token(characters)[
        characters.encode_line("t h e ▁ c a t", add_if_not_exist=False).long()
    ]
    by_word = characters_per_token(words)[words.encode_line("the cat", add_if_not_exist=False).long()]
    assert by_character.sum() == by_word.sum() == len("the cat\n")
