"""Is a folder made by fairseq-preprocess there, and whole?"""

import os
import struct
from typing import Optional

import numpy as np

from fairseq_hyperrouter.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 8, 8: 2, 9: 4, 10: 8}  # by fairseq's code of a number type
_INTEGERS = {1: np.uint8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16, 9: np.uint32, 10: np.uint64}
_LOOK_AT = 50_000_000  # tokens that are compared with the dictionary, a fraction of a second
_HEADER_BYTES = len(_MAGIC) + 8 + 1 + 8  # magic, version, type of a token, number of lines


def check_folders(data: str) -> None:
    """Raise a UserError when one of the folders of *data* is missing, or the first holds no dictionary."""
    folders = data.split(os.pathsep)
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f"DATA {folder}: no such folder; fairseq-preprocess makes it")
    if not os.path.isfile(os.path.join(folders[0], "dict.txt")):
        raise UserError(f"DATA {folders[0]}: holds no dict.txt; fairseq-preprocess --only-source makes it")


def check_split(prefix: str, num_symbols: Optional[int] = None) -> None:
    """Raise a UserError when prefix.bin is not as long as prefix.idx says, or was made with another dictionary.

    Stock fairseq notices a truncated .bin only when it comes to the missing lines, hours into a training.
    Other than the default (mmap) formats are left to stock fairseq.
    """
    index_path, data_path = prefix + ".idx", prefix + ".bin"
    if not os.path.isfile(index_path):
        raise UserError(f"no such file: {index_path}; fairseq-preprocess makes it")
    with open(index_path, "rb") as file:
        header = file.read(_HEADER_BYTES)
        if not header.startswith(_MAGIC):
            return
        is_whole = len(header) == _HEADER_BYTES
        if is_whole:
            _, token_type, num_lines = struct.unpack("<QBQ", header[len(_MAGIC) :])
            is_whole = os.path.getsize(index_path) == _HEADER_BYTES + 12 * num_lines
        if not is_whole:
            raise UserError(f"{index_path} is truncated: make it again with fairseq-preprocess")
        sizes = file.read(4 * num_lines)
    if token_type not in _TOKEN_BYTES:
        raise UserError(f"{index_path} is damaged: make it again with fairseq-preprocess")
    expected = int(np.frombuffer(sizes, np.int32).sum(dtype=np.int64)) * _TOKEN_BYTES[token_type]
    found = os.path.getsize(data_path) if os.path.isfile(data_path) else 0
    if found != expected:
        raise UserError(
            f"{data_path} has {found} bytes, {index_path} says {expected}: make it again with fairseq-preprocess"
        )
    if num_symbols is not None and token_type in _INTEGERS and found:
        tokens = np.memmap(data_path, dtype=_INTEGERS[token_type], mode="r")[:_LOOK_AT]
        if tokens.max() >= num_symbols:
            raise UserError(
                f"{data_path} holds token {tokens.max()}, dict.txt beside it has {num_symbols} entries: "
                "make them again with fairseq-preprocess"
            )
