"""Wrong answers to the exercises of notebook 05, and what is said of them."""

FIRST_IN_FIRST_OUT = """
def lru_pager(touches, room):
    on_card = []
    faults = 0
    for page in touches:
        if page not in on_card:
            faults += 1
            on_card = [*on_card, page][-room:]
    return faults
"""

NOTHING_GOES_OUT = """
def lru_pager(touches, room):
    return len(set(touches))
"""

EVERY_TOUCH = """
def lru_pager(touches, room):
    return len(touches)
"""

GIVES_THE_PAGES = """
def lru_pager(touches, room):
    return touches[-room:]
"""

WRONG = {
    1: {
        FIRST_IN_FIRST_OUT: "5 is too large. Hint: each touch makes its page the most recently used",
        NOTHING_GOES_OUT: "10 is too small",
        EVERY_TOUCH: "6 is too large",
        GIVES_THE_PAGES: "shape wrong: yours is (3,), needed is ()",
    },
    2: {
        "answer = 163_840": "163840 is too small",
        "answer = 655_360": "655360 is too large",
        "answer = 165_120": "165120 is too small",
    },
}
