"""The tables of a plan and of its rows, as every kernel reads them."""

ROW, FIRST_ADDRESS = 0, 1  # leaves: the row of its counters, then the addresses of each column (`Storage.columns`)
LEAF, START, COUNT = 0, 1, 2  # tiles
# Counters: updates made, the last step that the row was part of (the optimizer's own: steps made), steps skipped, and
# whether this one is not.
T, CLOCK, SKIPPED, GO = 0, 1, 2, 3
COUNTERS = 4
STEPS, TICKS = 0, 1  # advance: what a step adds to T of each row; whether the row is part of it, be it frozen
ADVANCES = 2
