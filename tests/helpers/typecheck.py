"""The type checker with which tests check annotations, shapes of tensors included, at run time."""

from beartype import BeartypeConf, beartype

# As for mypy and pydantic, an int is a valid float.
check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))
