"""Passwords in addresses are hidden, and nothing else is changed."""

import logging

import pytest

from hjepa.config.passwords import PasswordFilter, hide_passwords

HIDDEN = {
    "https://user:secret@host:5000/path": "https://user:***@host:5000/path",
    "postgresql+psycopg2://user:se/cr@et@host/db": "postgresql+psycopg2://user:***@host/db",
    "mysql://user:@secret@host": "mysql://user:***@host",
    "postgresql://host/db?user=a&password=secret&x=1": "postgresql://host/db?user=a&password=***&x=1",
    r"tracking.mlflow.uri=http\://user\:secret@host": r"tracking.mlflow.uri=http\://user\:***@host",
    r"tracking.mlflow.uri=mysql\\://user\\:secret@host": r"tracking.mlflow.uri=mysql\\://user\\:***@host",
    "https://me@corp.com:secret@host": "https://me@corp.com:***@host",
    "postgresql://admin@srv:secret@host/db": "postgresql://admin@srv:***@host/db",
    "HTTPS://user:secret@host, MySQL://user:secret@host": "HTTPS://user:***@host, MySQL://user:***@host",
    "failed (http://u:secret@h) and (mysql://u:secret@h)": "failed (http://u:***@h) and (mysql://u:***@h)",
}


@pytest.mark.parametrize(("text", "hidden"), HIDDEN.items())
def test_a_password_is_hidden_wherever_it_stands(text: str, hidden: str) -> None:
    assert hide_passwords(text) == hidden
    assert hide_passwords(hidden) == hidden
    assert hide_passwords({"a": [text, 1], "b": None}) == {"a": [hidden, 1], "b": None}
    record = logging.LogRecord("hjepa", logging.INFO, "", 0, "to %s", (text,), None)
    assert PasswordFilter().filter(record)
    assert record.getMessage() == f"to {hidden}"


@pytest.mark.parametrize(
    "text",
    [
        *("http://host:5000/x@y", "sqlite:////a b/mlflow.db", "https://user@host", "a:b@c", "s3://bucket/key", "10:30 a@b.c"),
        *("https://user@host:5000/x@y", "postgresql://user@host:5432/db"),
    ],
)
def test_addresses_without_passwords_stay(text: str) -> None:
    assert hide_passwords(text) == text
