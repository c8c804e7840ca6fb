# install: set up .venv; lint: style and types; test: the unit tests; test-all: everything, as CI does; docs: the site
install: ; python3 -m venv .venv && .venv/bin/pip install -q uv && .venv/bin/uv pip install -q -p .venv -e '.[dev]'
lint: ; .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy
test: ; .venv/bin/pytest -q -n auto tests/unit
test-all: ; .ci/run
docs: ; .venv/bin/mkdocs build --strict
.PHONY: install lint test test-all docs
