"""A rank of a run, in a process that has PyTorch in memory already: `Run` in test_parallel.py starts it."""

import multiprocessing
import os
import sys

environment: dict[str, str]
folder: str
output: str
arguments: list[str]
before: str

os.environ.update(environment)
# as in a process of its own
multiprocessing.set_start_method("fork", force=True)
os.chdir(folder)
file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(file, 1)
os.dup2(file, 2)
sys.argv = ["mambazoo", *arguments]
if before:
    exec(before)

from mambazoo.recipes.cli import main  # noqa: E402

main(arguments)
