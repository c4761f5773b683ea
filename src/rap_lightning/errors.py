"""The errors a user can cause. The command line prints their text alone, without a traceback."""


class UserError(ValueError):
    """Something the user can mend. The text says what was expected, what was found, and what to do."""


class ConfigError(UserError):
    """An option is wrong, or has no effect next to another one."""


class DataError(UserError):
    """The data can't be used as they are."""
