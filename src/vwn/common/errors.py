"""The one exception that means "the user can repair this": one sentence, the value, the way out."""


class UserError(ValueError):
    """Bad input or an option that cannot be met. The command line prints it as one line and exits with code 2."""


def require(holds: bool, option: str, what: str, value: object) -> None:
    """Raise a :class:`UserError` of one sentence for an option that is out of its range."""
    if not holds:
        raise UserError(f"--{option.replace('_', '-')} must be {what}, got {value}")
