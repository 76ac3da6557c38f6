"""What a command answers with: one message, exit status 2, no traceback."""


class Refusal(ValueError):
    """What a user asked for cannot be done as asked; the message says which key, what is allowed, and the cure."""
