"""No token in any record: what looks like a secret is hidden."""

import os
import re

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL|_KEY$|_PAT$", re.IGNORECASE)

_SECRET = re.compile(r"\b(hf_|ghp_|github_pat_|sk-)[A-Za-z0-9_-]{16,}")


def redact(value):
    """A copy without secrets, of a text or of whatever holds texts (keys are left alone): what
    looks like a token of a hub, and the value of every environment variable whose name says that it
    is a secret.

    >>> redact({"said": ["hf_" + 20 * "a"]})
    {'said': ['[hidden]']}
    """
    if isinstance(value, dict):
        return type(value)({key: redact(part) for key, part in value.items()})
    if isinstance(value, list | tuple):
        return [redact(part) for part in value]
    if isinstance(value, str):
        for name, secret in os.environ.items():
            value = (
                value.replace(secret, "[hidden]")
                if len(secret) >= 8 and _SECRET_NAME.search(name)
                else value
            )
        return _SECRET.sub("[hidden]", value)
    return value
