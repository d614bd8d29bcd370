"""A rank of a run, in a process that has PyTorch in memory already: `Run` in several.py starts it."""

import multiprocessing
import os
import sys

# what `runpy` was given
given = globals()
os.environ.update(given["environment"])
# as in a process of its own
multiprocessing.set_start_method("fork", force=True)
os.chdir(given["folder"])
output = os.open(given["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(output, 1)
os.dup2(output, 2)
sys.argv = ["mambazoo", *given["arguments"]]
exec(given["before"])

from mambazoo.recipes.cli import main  # noqa: E402

main(given["arguments"])
