"""`fastcifar COMMAND` and `python -m fastcifar COMMAND`."""

from fastcifar.commands import entry

if __name__ == "__main__":
    entry()
