"""``python -m benchmarks.verify_gpu.child FUNCTION ARGUMENTS FOLDER [LEFT_OUT ...]``: see `children.command_of`."""

import json
import sys
from pathlib import Path

from .children import run_here

if __name__ == "__main__":
    run_here(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), tuple(sys.argv[4:]))
