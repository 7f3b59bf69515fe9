"""Tiny models, built in this process without a data folder."""

from types import SimpleNamespace

import torch
from fairseq.data import Dictionary

from fairseq_hyperrouter.models.transformer_lm import HyperRouterLanguageModel, HyperRouterLanguageModelConfig
from fairseq_hyperrouter.routing import ROUTERS

torch.set_num_threads(1)  # tensors this small only lose by threads

TINY = {
    "decoder_layers": 2,
    "decoder_embed_dim": 8,
    "decoder_input_dim": 8,
    "decoder_output_dim": 8,
    "decoder_ffn_embed_dim": 12,
    "decoder_attention_heads": 2,
    "dropout": 0.0,
    "moe_expert_count": 4,
    # what a full fairseq config would resolve
    "add_bos_token": False,
    "tokens_per_sample": 16,
    "max_target_positions": 16,
    "tpu": False,
    "moe_top_k_schedule_updates": 0,
    "max_update": 0,
    "seed": 1,
}


DECODER_ROUTERS = sorted(name for name, router in ROUTERS.items() if not router.looks_ahead)

ADAPTIVE = {
    "adaptive_input": True,
    "adaptive_input_cutoff": "6,11",
    "adaptive_input_factor": 2,
    "adaptive_softmax_cutoff": "6,11",
    "adaptive_softmax_factor": 2,
}
"""Adaptive input and softmax with two tails."""


def tiny_dictionary(symbols="abcdefghijkl"):
    dictionary = Dictionary()
    for symbol in symbols:
        dictionary.add_symbol(symbol)
    return dictionary


def tiny_task():
    """All that models and criterions ask of a task."""
    dictionary = tiny_dictionary()
    return SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)


def tiny_model(model_class=HyperRouterLanguageModel, rng_seed=0, **options):
    """A language model of 16 symbols, 2 layers of width 8, 4 experts of width 12.

    *rng_seed* is that of the global random generator, which draws what is not MoE; the option seed draws the rest.
    """
    config = HyperRouterLanguageModelConfig()
    only = ROUTERS[options.get("moe_router", "hyperrouter")].trains_with
    if "moe_router_init_std" not in ROUTERS[options.get("moe_router", "hyperrouter")].takes:
        options.pop("moe_router_init_std", None)
    if options.get("moe_router") == "stable":
        options.setdefault("moe_stage1_updates", 5)
    for name, value in {**TINY, **({"moe_top_k": only} if only else {}), **options}.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    torch.manual_seed(rng_seed)
    return model_class.build_model(config, tiny_task())


def tiny_sample(lengths=(9, 5), seed=0):
    """A fairseq batch of random sentences, padded to the longest."""
    dictionary = tiny_dictionary()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(dictionary.nspecial, len(dictionary), (len(lengths), max(lengths) + 1), generator=generator)
    for row, length in zip(tokens, lengths):
        row[length + 1 :] = dictionary.pad()
    source, target = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    source[target == dictionary.pad()] = dictionary.pad()
    return {
        "net_input": {"src_tokens": source, "src_lengths": torch.tensor(lengths)},
        "target": target,
        "ntokens": sum(lengths),
        "nsentences": len(lengths),
    }
