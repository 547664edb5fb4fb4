"""`python -m tinyfusion`, and so `torchrun -m tinyfusion` and `accelerate launch -m tinyfusion`."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    # until `main` watches for signals: a KeyboardInterrupt can be dropped, and shows a traceback where it is not
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from tinyfusion.cli import main

    sys.exit(main())
