"""Speed on a GPU: a layer, fairseq-train, generation. ``python -m benchmarks.gpu DATA`` runs all of it."""
