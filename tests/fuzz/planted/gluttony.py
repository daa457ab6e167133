"""A parser that takes 600 MiB for a moment, on its third case."""


def prepare(folder):
    cases = []

    def case(draw, place):
        cases.append(draw)
        taken = b"x" * (600 * 2**20 if len(cases) == 3 else 1)
        return "parsed" if taken else "nothing"

    return case
