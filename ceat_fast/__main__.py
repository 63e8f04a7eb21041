"""`python -m ceat_fast ...` is the command line, and so is `torchrun ... -m ceat_fast ...`."""

from __future__ import annotations

import sys

from ceat_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
