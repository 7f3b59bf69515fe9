"""The language models whose training, evaluation and decoding is timed, as options of fairseq's commands."""

from pathlib import Path
from typing import List, NamedTuple

from .sizes import EXPERTS, HIDDEN, WIDTH

USER_DIR = Path(__file__).parents[1] / "fairseq_hyperrouter"


class Model(NamedTuple):
    """Its size, and its batch."""

    name: str
    layers: int
    moe_layers: str
    D: int
    hidden: int
    heads: int
    samples: int
    tokens: int

    @property
    def size(self) -> str:
        """As titles say it."""
        return f"{self.layers} layers, d {self.D}, F {self.hidden}, E {EXPERTS}"


SMALL = Model("the paper's small", 4, "0,1,2,3", WIDTH, HIDDEN, heads=8, samples=22, tokens=512)
LARGE = SMALL._replace(name="the paper's large", layers=18)
BILLION = Model("a billion parameters", 12, "1,3,5,7,9,11", 1024, 4096, heads=16, samples=16, tokens=1024)
TINY = Model("a tiny one", 2, "0,1", 16, 32, heads=2, samples=2, tokens=32)


def stock(model: Model, k: int) -> List[str]:
    """Options of the dense model: k F where the other has experts, F elsewhere; stock has one width for all layers."""
    sparse = len(model.moe_layers.split(","))
    hidden = round(model.hidden * (k * sparse + model.layers - sparse) / model.layers)
    arch = ("--arch", "transformer_lm", "--task", "language_modeling", "--criterion", "cross_entropy")
    return [*_common(model), *arch, "--decoder-ffn-embed-dim", str(hidden)]


def experts(model: Model, k: int, router: str = "hyperrouter") -> List[str]:
    """Options of the model with experts."""
    return [
        *_common(model),
        *("--arch", "transformer_lm_hyperrouter", "--task", "hyperrouter", "--criterion", "moe_cross_entropy"),
        *("--decoder-ffn-embed-dim", str(model.hidden), "--moe-layers", model.moe_layers, "--moe-router", router),
        *("--moe-expert-count", str(EXPERTS), "--moe-top-k", str(k)),
    ]


def _common(model: Model) -> List[str]:
    widths = [f"--decoder-{name}-dim" for name in ("embed", "input", "output")]
    return [
        *("--user-dir", str(USER_DIR), "--share-decoder-input-output-embed"),
        *("--decoder-layers", str(model.layers), "--decoder-attention-heads", str(model.heads)),
        *(part for option in widths for part in (option, str(model.D))),
        *("--tokens-per-sample", str(model.tokens), "--batch-size", str(model.samples)),
    ]
