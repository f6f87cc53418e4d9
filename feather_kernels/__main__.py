"""``python -m feather_kernels``: the command line."""

import sys

from feather_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
