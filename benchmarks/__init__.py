"""Measurements beside other libraries and stock fairseq; nothing here is a test. See README.md."""
