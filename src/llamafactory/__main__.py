"""`python -m llamafactory`: the same as `llamafactory-cli`."""

import sys

from llamafactory.cli import main

if __name__ == "__main__":
    sys.exit(main())
