#!/usr/bin/env bash
# Fetch a text from its public address and prepare it with fairseq-preprocess.
#
#   prepare.sh wikitext-2 | wikitext-103 | enwik8 | FILE [DIR]
#
# FILE is any text, taken byte by byte as enwik8 is (90 % to train, 5 % valid, 5 % test).
# Everything goes to DIR, by default data-bin/NAME. Raw files that are in DIR/raw already are not fetched again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ $# = 0 ]; then
    echo "prepare.sh: error: name wikitext-2, wikitext-103, enwik8 or a text file" >&2
    exit 2
fi
name=$1
dir=${2:-data-bin/$(basename "$name" .txt)}
raw=$dir/raw
mkdir -p "$raw"

fetch() { # URL: download and unpack a zip archive into $raw
    echo "fetching $1"
    curl --fail --location --progress-bar --output "$raw/archive.zip" "$1" || {
        echo "prepare.sh: error: $1: cannot be fetched; its unpacked files may be put into $raw" >&2
        exit 1
    }
    python -m zipfile --extract "$raw/archive.zip" "$raw"
    rm "$raw/archive.zip"
}

case $name in
    wikitext-2 | wikitext-103) # words, as published, <unk> and all
        if [ ! -f "$raw/wiki.test.tokens" ]; then
            fetch "https://wikitext.smerity.com/$name-v1.zip"
            mv "$raw/$name"/wiki.*.tokens "$raw"
        fi
        for split in train valid test; do cp "$raw/wiki.$split.tokens" "$raw/$split.txt"; done
        ;;
    enwik8) # bytes, the usual 90M / 5M / 5M
        [ -f "$raw/enwik8" ] || fetch http://mattmahoney.net/dc/enwik8.zip
        python "$here/characters.py" "$raw/enwik8" "$raw" --valid 5000000 --test 5000000
        ;;
    *)
        python "$here/characters.py" "$name" "$raw"
        ;;
esac
fairseq-preprocess --only-source --trainpref "$raw/train.txt" --validpref "$raw/valid.txt" \
    --testpref "$raw/test.txt" --destdir "$dir" --workers 2
echo "data in $dir"
