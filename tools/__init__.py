"""Commands that read what runs wrote, or prepare what they read."""

import sys
from collections.abc import Callable

import common


def exit_code(prog: str, work: Callable[[], int | None]) -> int:
    """Do the work of a command: 0, or the code that it gives; 130 when it was interrupted.

    2, with one line on stderr, for what is wrong or cannot be read or written.
    """
    try:
        with common.printing():
            return work() or 0
    except (common.UserError, common.RunError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
