#!/bin/sh
# Checks links, the table of contents and the wording of the documentation; `--rust` also checks the
# Rust sources. tests/docs.py does the work.
exec python3 "$(dirname "$0")/docs.py" "$@"
