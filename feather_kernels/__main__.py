"""``python -m feather_kernels``: the command line; without arguments, ``doctor``."""

import sys

from feather_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["doctor"]))
