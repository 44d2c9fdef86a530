"""`fastcifar COMMAND` and `python -m fastcifar COMMAND`."""

import sys

from fastcifar.commands import main

if __name__ == "__main__":
    sys.exit(main())
