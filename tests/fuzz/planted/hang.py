"""A parser that does not end, on its third case."""

import time

LIMIT = 3.0


def prepare(folder):
    cases = []

    def case(draw, place):
        cases.append(draw)
        draw.note(f"case {len(cases)} of this process")
        if len(cases) == 3:
            time.sleep(1000)
        return "parsed"

    return case
