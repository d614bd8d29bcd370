NAME, SUMMARY = "bench", "time kernels and models against what else is installed"
def add_arguments(p): pass
def run(a): return 0
