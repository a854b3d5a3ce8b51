"""`python -m diffpp_fast` is `diffpp-fast`."""

import sys

from diffpp_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
