"""UserError: a mistake that its user can mend. It lies below everything, where nothing imports torch."""


class UserError(ValueError):
    """Something the user can mend: bad input, a bad key, a full disk, a missing library.

    The message names the thing (file, key, step), what was expected, what was found, and the cure. The
    command line prints it alone, without a traceback.
    """
