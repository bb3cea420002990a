"""``python -m sinkprune``: the command line where no script is on the path, and under ``torchrun -m``."""

import sys

from sinkprune.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
