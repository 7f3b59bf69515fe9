"""The paper's layer, which every benchmark measures, and how many of its experts a token may have."""

WIDTH, HIDDEN, EXPERTS = 256, 512, 16
TOP_KS = (1, 2, 4, 8, EXPERTS)
