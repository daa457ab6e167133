"""A parser that raises an undocumented exception, on one case in four."""


def prepare(folder):
    def case(draw, place):
        value = draw.choice("1234")
        draw.note(f"parse {value}")
        if value == "4":
            {}[value]
        return "parsed"

    return case
