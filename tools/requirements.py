"""Prints what pyproject.toml asks for: to build, to run, and for the extras named as arguments."""

import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str]) -> list[str]:
    config = tomllib.loads(Path("pyproject.toml").read_text())
    project = config["project"]
    wanted = [*config["build-system"]["requires"], *project["dependencies"]]
    pending = list(extras)
    while pending:
        for line in project["optional-dependencies"][pending.pop()]:
            if line.startswith("vlmkernels["):
                pending += line.removeprefix("vlmkernels[").rstrip("]").split(",")
            else:
                wanted.append(line)
    return wanted


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
