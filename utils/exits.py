"""How a program ends: one line for what the user did wrong, one line for Ctrl-C, and an exit code that says which."""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from configs.errors import UserError

WRONG_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are one sentence, too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python {self.prog} --help")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Exit with what `main` returns. UserError: its sentence, code 2. Ctrl-C: a line, 130. SIGTERM, cleaned up: 143."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main() or 0
    except UserError as error:
        code = _say(f"error: {' '.join(str(error).splitlines())}", WRONG_INPUT)
    except KeyboardInterrupt:
        code = _say("interrupted: what was finished is kept, the rest has left no file", INTERRUPTED)
    sys.exit(code)


def _terminate(signum, frame) -> NoReturn:
    sys.exit(TERMINATED)  # unwinds the stack, so that half-written files are removed


def _say(line: str, code: int) -> int:
    sys.stderr.write(line + "\n")
    return code
