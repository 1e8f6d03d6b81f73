"""`leaving.py SCRIPT ...`: run a script that ends its process group, and leave at once.

On a busy machine a thread of gloo that asks for the interpreter in its last moments aborts the
process ("terminate called without an active exception"; torch 2.13), after all work is done.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
