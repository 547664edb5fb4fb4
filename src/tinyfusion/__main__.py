"""`python -m tinyfusion`, and so `torchrun -m tinyfusion` and `accelerate launch -m tinyfusion`."""

from __future__ import annotations

import sys

from tinyfusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
