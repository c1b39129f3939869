"""Commands that read what runs wrote, or prepare what they read."""

import sys
from collections.abc import Sequence

import common


def exit_code(parser: common.Parser, argv: Sequence[str] | None) -> int:
    """Do `work(args)` of a command line: 0, or the code that it gives; 130 when it was interrupted.

    2, with one line on stderr, for what is wrong or cannot be read or written.
    """
    args = parser.parse_args(argv)
    try:
        with common.printing():
            return args.work(args) or 0
    except (common.UserError, common.RunError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
