"""The command line's parser: what is wrong with an argument is one line, like everything else that is wrong."""

from __future__ import annotations

import argparse
from typing import NoReturn

from afd.config_file import ConfigError


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, raising where that one prints its usage and exits; subcommands get the same kind."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            ConfigError: always; the message names the argument, and where to read more.
        """
        raise ConfigError(f"{message} (see {self.prog} --help)")
