"""`python -m fastcifar.train`, the same as `fastcifar train`."""

import sys

from fastcifar.commands import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
