#!/usr/bin/env python3
"""Split a text into train, valid and test files in which every byte is a token, for fairseq-preprocess.

    characters.py TEXT OUT_DIR [--valid N] [--test N]

A byte becomes one symbol, the line feed the end of the line; so bits per token are bits per byte (for ASCII text:
per character). Printable ASCII stands for itself, any other byte B for the character U+0100 + B.
"""

import argparse
import sys
from pathlib import Path

SYMBOLS = {byte: chr(byte) if 33 <= byte < 127 else chr(0x100 + byte) for byte in range(256)}


def main() -> None:
    """Read TEXT and write OUT_DIR/{train,valid,test}.txt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--valid", type=int, help="bytes of the second last part (default: 5 %% of the text)")
    parser.add_argument("--test", type=int, help="bytes of the last part (default: 5 %% of the text)")
    args = parser.parse_args()

    if not args.text.is_file():
        sys.exit(f"characters.py: error: TEXT {args.text}: no such file")
    text = args.text.read_bytes()
    valid = len(text) // 20 if args.valid is None else args.valid
    test = len(text) // 20 if args.test is None else args.test
    if valid < 1 or test < 1 or valid + test >= len(text):
        sys.exit(
            f"characters.py: error: --valid {valid} and --test {test}: must leave some of {len(text)} bytes to train"
        )
    train = len(text) - valid - test
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", text[:train]), ("valid", text[train:-test]), ("test", text[-test:])):
        path = args.out_dir / f"{name}.txt"
        lines = part.removesuffix(b"\n").split(b"\n")
        path.write_text("".join(" ".join(map(SYMBOLS.__getitem__, line)) + "\n" for line in lines), encoding="utf-8")
        print(f"wrote {path}: {len(part):,} bytes")


if __name__ == "__main__":
    main()
