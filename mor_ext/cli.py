"""The command ``mor``: each of its commands is a module with ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "train": ("mor_ext.training.command", "train a model from a config"),
    "generate": ("mor_ext.inference.command", "continue prompts, each token at its own depth"),
    "calibrate": ("mor_ext.evaluation.calibrate_command", "thresholds for wanted depths"),
    "eval": ("mor_ext.evaluation.command", "evaluate a saved model on text and tasks"),
    "info": ("mor_ext.info", "what is installed, built and found"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 if the command could not do what it was told."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="mor", description=__doc__)
    parser.add_argument("--traceback", action="store_true", help="of an error, where it comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    name = None
    try:
        for name, (module, summary) in COMMANDS.items():
            command = commands.add_parser(name, help=summary, description=summary)
            if name in arguments:  # the others need not be installed
                command.set_defaults(run=import_module(module).run)
                import_module(module).add_arguments(command)
        options = parser.parse_args(arguments)
        name = options.command
        options.run(options)
    except (ImportError, OSError, ValueError) as error:
        if "--traceback" in arguments:
            raise
        print(f"mor {name}: {_in_a_line(error)}", file=sys.stderr)
        return 2
    return 0


def _in_a_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"needs {error.name}: pip install 'mor_ext[train]'"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
