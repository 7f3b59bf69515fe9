"""Whether fairseq-train takes its arguments, asked without starting it."""

import contextlib
import difflib
import io
import warnings
from typing import Sequence

from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import DictConfig

from fairseq_hyperrouter.config import MoEConfig
from fairseq_hyperrouter.criterions.moe_cross_entropy import MoECrossEntropyConfig
from fairseq_hyperrouter.errors import UserError


def check_arguments(place: str, arguments: Sequence[str]) -> DictConfig:
    """The config that they make.

    Raises:
        UserError (a ValueError): it begins with *place*; for what the parser would refuse, or the checks of the model's
        and the criterion's own options. What these say together with the data and the rest of a training,
        fairseq-train checks when it starts.
    """
    said, parser = io.StringIO(), options.get_training_parser()
    try:
        with contextlib.redirect_stderr(said):
            args, unknown = options.parse_args_and_arch(parser, list(arguments), parse_known=True)
    except SystemExit:
        message = said.getvalue().strip().rpartition("error: ")[2].replace("argument ", "", 1)
        raise UserError(f"{place}: {message.replace('invalid <lambda> value', 'invalid value')}") from None
    if unknown:
        near = difflib.get_close_matches(unknown[0], parser._option_string_actions, n=1)
        hint = f", {near[0]}?" if near else ""
        raise UserError(f"{place}: {unknown[0]}: fairseq-train has no such option{hint}")
    with contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hydra's, of its own parts
        cfg = convert_namespace_to_omegaconf(args)
    try:
        if hasattr(cfg.model, "moe_router"):
            MoEConfig.from_namespace(cfg.model).check(cfg.model.decoder_layers)
        if cfg.criterion._name == "moe_cross_entropy":
            MoECrossEntropyConfig.from_namespace(cfg.criterion).check()
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    return cfg
