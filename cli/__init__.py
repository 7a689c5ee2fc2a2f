"""The command `taut`."""


class UserError(ValueError):
    """Something that the user can put right; `taut` shows it as one line, without a traceback."""
