"""``python -m sinkprune.cli``: the first address of ``python -m sinkprune``, for scripts that call it."""

import sys

from sinkprune.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
