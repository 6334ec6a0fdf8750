"""The one kind of error that is a message to a person."""


class UserError(ValueError):
    """What the person at the keyboard can mend: the message names the field or file, its value, and the mend.

    The commands print it as one line and exit with status 2; every other exception is a fault of ours and keeps its
    traceback.
    """
