"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Something the user gave is wrong; the message is one sentence naming the field, its value and a fix.

    Entry points print the message and exit with code 2. Everything else that is raised is our own mistake.
    """
