import os
import struct

import pytest
import torch
from fairseq.data import indexed_dataset
from fairseq.data.data_utils import load_indexed_dataset

from fairseq_hyperrouter import UserError
from fairseq_hyperrouter.checks.data_folder import check_folders, check_split
from fairseq_hyperrouter.command_line import explain
from tests.tiny import tiny_dictionary

SMALL, LARGE = 100, 100_000  # sizes of the vocabulary: fairseq writes 2 and 4 bytes a token


def write_split(folder, vocabulary=SMALL, lines=((1, 2, 3), (4,), (5, 6)), impl="mmap"):
    prefix = str(folder / "train")
    builder = indexed_dataset.make_builder(prefix + ".bin", impl, vocabulary)
    for line in lines:
        builder.add_item(torch.tensor(line))
    builder.finalize(prefix + ".idx")
    return prefix


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
@pytest.mark.parametrize("lines", [(), ((1,),), ((1, 2, 3), (4,), (5, 6))], ids=len)
def test_whole_split(tmp_path, vocabulary, lines):
    check_split(write_split(tmp_path, vocabulary, lines))


@pytest.mark.parametrize("impl", ["lazy", "cached"])
def test_other_formats_are_left_to_fairseq(tmp_path, impl):
    check_split(write_split(tmp_path, impl=impl))


@pytest.mark.parametrize("vocabulary, token_bytes", [(SMALL, 2), (LARGE, 4)])
@pytest.mark.parametrize("change", [-1, -6, 1])
def test_data_of_another_length(tmp_path, vocabulary, token_bytes, change):
    prefix = write_split(tmp_path, vocabulary)
    size = 6 * token_bytes
    os.truncate(prefix + ".bin", size + change)
    with pytest.raises(UserError, match=rf"train.bin has {size + change} bytes, .*train.idx says {size}: .*preprocess"):
        check_split(prefix)


def test_no_data(tmp_path):
    prefix = write_split(tmp_path)
    os.remove(prefix + ".bin")
    with pytest.raises(UserError, match=r"train.bin has 0 bytes, .*train.idx says 12"):
        check_split(prefix)


def test_truncated_index(tmp_path):
    prefix = write_split(tmp_path)
    whole = (tmp_path / "train.idx").read_bytes()
    for size in range(9, len(whole)):
        (tmp_path / "train.idx").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"train.idx is truncated: make it again with fairseq-preprocess"):
            check_split(prefix)


@pytest.mark.parametrize("size", [0, 8])
def test_index_without_its_first_nine_bytes_is_left_to_fairseq(tmp_path, size):
    prefix = write_split(tmp_path)
    os.truncate(prefix + ".idx", size)
    check_split(prefix)
    with pytest.raises(AssertionError) as caught:
        load_indexed_dataset(prefix, tiny_dictionary())
    assert "is damaged: make it again with fairseq-preprocess" in explain(caught.value)


def test_index_too_long(tmp_path):
    prefix = write_split(tmp_path)
    with open(prefix + ".idx", "ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=r"train.idx is truncated"):
        check_split(prefix)


def test_index_with_an_unknown_type_of_token(tmp_path):
    prefix = write_split(tmp_path)
    with open(prefix + ".idx", "r+b") as file:
        file.seek(17)
        file.write(b"\xff")
    with pytest.raises(UserError, match=r"train.idx"):
        check_split(prefix)


@pytest.mark.parametrize("lines", [2**44, 2**62])
def test_index_that_says_more_lines_than_there_can_be(tmp_path, lines):
    prefix = write_split(tmp_path)
    whole = (tmp_path / "train.idx").read_bytes()
    (tmp_path / "train.idx").write_bytes(whole[:18] + struct.pack("<Q", lines) + whole[26:])
    with pytest.raises(UserError, match=r"train.idx is truncated"):
        check_split(prefix)


def test_no_index(tmp_path):
    with pytest.raises(UserError, match=r"no such file: .*valid.idx; fairseq-preprocess makes it"):
        check_split(str(tmp_path / "valid"))


def test_dictionary(tmp_path):
    with pytest.raises(UserError, match=r"DATA .*nowhere: no such folder; fairseq-preprocess makes it"):
        check_folders(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"holds no dict.txt; fairseq-preprocess --only-source makes it"):
        check_folders(str(tmp_path))
    (tmp_path / "dict.txt").write_text("a 1\n")
    check_folders(str(tmp_path))
    (tmp_path / "other").mkdir()
    check_folders(os.pathsep.join([str(tmp_path), str(tmp_path / "other")]))  # the first one's dictionary is read
    with pytest.raises(UserError, match="DATA nope: no such folder"):
        check_folders(os.pathsep.join([str(tmp_path), "nope"]))
