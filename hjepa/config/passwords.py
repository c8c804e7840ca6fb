"""Passwords in addresses, such as `https://user:PASSWORD@host` and `postgresql://user:PASSWORD@host/db`.

Runs print and write `***` in their place; only the pickles that pass a sweep's jobs their configs contain them.
"""

import logging
import re
from typing import Any

HIDDEN = "***"

PATTERNS = (  # Hydra writes colons in the overrides of a sweep as `\:`
    re.compile(r"(\bhttps?\\*://[^\s:/]*:)[^\s/]*(?=@)", re.IGNORECASE),
    # Passwords of databases may contain a slash.
    re.compile(r"(\b(?!https?\\*:)[a-z][\w+.-]*\\*://[^\s:/]*:)\S*(?=@)", re.IGNORECASE),
    re.compile(r"([?&](?:password|passwd|token|sslpassword)=)[^&\s'\"]+", re.IGNORECASE),
)


def hide_passwords(value: Any) -> Any:
    """Return a text, or nested data with texts, with `***` in place of the passwords of addresses."""
    if isinstance(value, dict):
        return {key: hide_passwords(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hide_passwords(item) for item in value]
    if isinstance(value, str):
        for pattern in PATTERNS:
            value = pattern.sub(rf"\1{HIDDEN}", value)
    return value


class PasswordFilter(logging.Filter):
    """A filter of log handlers that hides passwords."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = hide_passwords(record.getMessage()), ()
        return True


def hide_passwords_in_logs() -> None:
    """Let the handlers of the root logger hide passwords."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(existing, PasswordFilter) for existing in handler.filters):
            handler.addFilter(PasswordFilter())
