"""A parser that kills its process, on its third case."""

import os
import signal


def prepare(folder):
    cases = []

    def case(draw, place):
        cases.append(draw)
        draw.note(f"case {len(cases)} of this process")
        if len(cases) == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        return "parsed"

    return case
