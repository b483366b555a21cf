"""`python -m pyoffline` is `pyoffline`."""

import sys

from pyoffline.cli import main

if __name__ == "__main__":
    sys.exit(main())
