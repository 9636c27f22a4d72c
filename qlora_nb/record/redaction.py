"""No token in any record: what looks like a secret is hidden before it is written.

A run's record holds error messages, and a notebook's output can hold anything: a token for the hub
gets into either with one `print`. Hidden are the value of every environment variable whose name
says that it is a secret, and texts with the known beginnings of tokens.
"""

import os
import re

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL|_KEY$|_PAT$", re.IGNORECASE)

_SECRET = re.compile(r"\b(hf_|ghp_|github_pat_|sk-)[A-Za-z0-9_-]{16,}")


def redact(value):
    """A copy without secrets, of a text or of whatever holds texts; keys are left alone.

    >>> redact({"said": ["hf_" + 20 * "a"]})
    {'said': ['[hidden]']}
    """
    named = [secret for name, secret in os.environ.items() if _SECRET_NAME.search(name)]
    secrets = [secret for secret in named if len(secret) >= 8]

    def clean(part):
        if isinstance(part, dict):
            return type(part)({key: clean(own) for key, own in part.items()})
        if isinstance(part, list | tuple):
            return [clean(own) for own in part]
        if not isinstance(part, str):
            return part
        for secret in secrets:
            part = part.replace(secret, "[hidden]")
        return _SECRET.sub("[hidden]", part)

    return clean(value)
