"""Whether fairseq-train knows its arguments, asked without starting it."""

import contextlib
import difflib
import io
from typing import Sequence

from fairseq import options

from fairseq_hyperrouter.errors import UserError


def check_arguments(place: str, arguments: Sequence[str]) -> None:
    """Raise a UserError (a ValueError), which begins with *place*, for an option or value that its parser refuses.

    What the options say together, fairseq-train checks when it starts.
    """
    said, parser = io.StringIO(), options.get_training_parser()
    try:
        with contextlib.redirect_stderr(said):
            _, unknown = options.parse_args_and_arch(parser, list(arguments), parse_known=True)
    except SystemExit:
        message = said.getvalue().strip().rpartition("error: ")[2].replace("argument ", "", 1)
        raise UserError(f"{place}: {message.replace('invalid <lambda> value', 'invalid value')}") from None
    if unknown:
        near = difflib.get_close_matches(unknown[0], parser._option_string_actions, n=1)
        hint = f", {near[0]}?" if near else ""
        raise UserError(f"{place}: {unknown[0]}: fairseq-train has no such option{hint}")
