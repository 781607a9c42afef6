"""The command line: one sub-command per bench, each module bringing its own arguments."""

import argparse
import sys

from . import cost, gpu, model, report, step, tune


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in {
        "step": step,
        "cost": cost,
        "tune": tune,
        "gpu": gpu,
        "report": report,
        "model": model,
    }.items():
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0])
        module.add_arguments(command)
        command.set_defaults(run=module.run, error=command.error)
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    args.command = words  # a bench writes down how it was called
    args.run(args)


if __name__ == "__main__":
    main()
