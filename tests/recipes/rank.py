"""A rank of a run, in a process that has PyTorch in memory already: `ranks` in test_parallel.py starts it."""

import os
import sys
from typing import Any

environment: dict[str, str]
folder: str
output: str
arguments: list[str]
before: Any

os.environ.update(environment)
os.setsid()
os.chdir(folder)
file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(file, 1)
os.dup2(file, 2)
sys.argv = ["mambazoo", *arguments]
if before:
    exec(before)

from mambazoo.recipes.cli import main  # noqa: E402

main(arguments)
