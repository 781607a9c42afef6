"""The command line: one sub-command per bench, each module bringing its own arguments."""

import argparse
import sys

from . import cost, gpu, model, report, scale, step, train, tune


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (step, train, cost, scale, tune, gpu, report, model):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0])
        module.add_arguments(command)
        command.set_defaults(run=module.run, error=command.error)
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    args.command = words  # a bench writes down how it was called
    args.run(args)


if __name__ == "__main__":
    main()
