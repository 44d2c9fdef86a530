"""`python -m fastcifar.train`, the same as `fastcifar train`."""

from fastcifar.commands import entry

if __name__ == "__main__":
    entry("train")
