"""The one exception that means "the user can repair this": one sentence, the value, the way out."""


class UserError(ValueError):
    """Bad input or an option that cannot be met. The command line prints it as one line and exits with code 2."""
