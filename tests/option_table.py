"""docs/options.md, from the options' own help: ``python -m tests.option_table`` writes it."""

import dataclasses
from pathlib import Path

from fairseq.tasks.language_modeling import LanguageModelingConfig

from fairseq_hyperrouter.config import MoEConfig
from fairseq_hyperrouter.criterions.moe_cross_entropy import MoECrossEntropyConfig
from fairseq_hyperrouter.tasks.hyperrouter import HyperRouterTaskConfig

PATH = Path(__file__).parents[1] / "docs" / "options.md"
HEAD = """# Options

Of `--arch transformer_lm_hyperrouter`, `--criterion moe_cross_entropy` and `--task hyperrouter`, beside all that stock
fairseq has. What the routing methods are, what goes with what, and papers: [methods.md](methods.md).
"""
STOCK = {"sentence_avg", *(field.name for field in dataclasses.fields(LanguageModelingConfig))}


def option_table() -> str:
    """The whole file."""
    parts = [HEAD]
    for title, config in (
        ("Model", MoEConfig),
        ("Criterion `moe_cross_entropy`", MoECrossEntropyConfig),
        ("Task `hyperrouter`", HyperRouterTaskConfig),
    ):
        parts.append(f"## {title}\n\n| option | default | |\n|---|---|---|")
        for field in dataclasses.fields(config):
            if "help" in field.metadata and field.name not in STOCK:
                default = "" if field.default is None or str(field.default).startswith("${") else field.default
                default = "off" if default is False else default
                parts.append(f"| `--{field.name.replace('_', '-')}` | {default} | {field.metadata['help']} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PATH.write_text(option_table(), encoding="utf-8")
    print(f"wrote {PATH}")
