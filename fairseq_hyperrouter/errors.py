"""What a user did wrong, as exceptions; ``command_line.py`` says how a command ends with one."""


class UserError(ValueError):
    """A mistake in an option, a file or a call; the message names it, its value and what is allowed."""


class WrongCheckpoint(UserError):
    """The tensors of a checkpoint do not fit the model; who catches it may know the file."""


def option_name(field: str) -> str:
    """As a user types it: "moe_top_k" -> "--moe-top-k"."""
    return "--" + field.replace("_", "-")
