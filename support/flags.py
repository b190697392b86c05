"""A dataclass is a command line: every field a flag, with default, choices and help in one place."""

import argparse
import math
from dataclasses import field, fields

from support.processes import is_first

def option(default, help: str, choices=None, zero: bool = False, several: type | None = None):
    """A field that is a flag of its default's type, or a list of values of the type `several`. A number must be greater
    than 0, or 0 where that is the default or `zero` allows it."""
    kind, zero = several or type(default), zero or default == 0
    return field(default=default, metadata={"help": help, "choices": choices, "zero": zero, "several": several,
                                            "kind": kind})

def parse(config, program: str, description: str, recipe=lambda given: {}, argv=None):
    """(settings, error): flags of the dataclass `config`; what is not given takes recipe(given)'s value, or else its
    default. A mistake ends the program with one line and exit code 2; error(message) does so too."""
    parser = argparse.ArgumentParser(prog=program, description=description, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"{program}: {message}\n" if is_first() else None)
    for f in fields(config):
        kind, several = f.metadata["kind"], f.metadata["several"]
        help = f.metadata["help"] + (f" (default: {f.default})" if f.default or kind is bool else "")
        if kind is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=help)
        else:
            parser.add_argument(f"--{f.name}", type=kind, choices=f.metadata["choices"], help=help,
                                nargs="+" if several else None)
    given = vars(parser.parse_args(argv))
    settings = config(**{**recipe(given), **given})
    for f in fields(config):
        value = getattr(settings, f.name)
        for number in value if f.metadata["several"] else [value]:
            zero = f.metadata["zero"]
            if type(number) in (int, float) and not (0 < number < math.inf or number == 0 and zero):
                parser.error(f"--{f.name} must be a number {'from' if zero else 'greater than'} 0, not {number}")
        if f.metadata["several"] is int and len(value) > 2:
            parser.error(f"--{f.name} is one number or two, not {len(value)}")
    return settings, parser.error

def encoding(settings) -> dict:
    """The flags about prompts and image sizes, as data.Processor.encode takes them; what was not given is None."""
    sides = (*settings.image_size, *settings.image_size)[:2]  # one number is both
    return {"think": settings.think, "image_size": sides or None, "min_pixels": settings.min_pixels or None,
            "max_pixels": settings.max_pixels or None}
