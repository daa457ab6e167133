"""One command that tests, times and tunes the GPU kernels in minutes, whatever crashes or hangs: docs/cuda.md.

The process of `__main__` never touches the GPU. It walks through `plan.PARTS` by the clock and gives every measurement
to a child in its own process group (`children`), which reports steps and rows as JSON lines (`reporter`). A child
that dies or falls silent costs the row it was at; a fresh one continues with the others. `result` keeps the rows.
"""
