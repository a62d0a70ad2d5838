"""`python -m llmrec` is `llmrec`; launchers start it in this spelling."""

from __future__ import annotations

import sys

from llmrec.cli import main

if __name__ == "__main__":
    sys.exit(main())
