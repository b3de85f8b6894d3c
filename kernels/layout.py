"""The tables of a plan and of its rows, as every kernel reads them."""

ROW, FIRST_ADDRESS = 0, 1  # leaves: the row of its counters, then the addresses of each column (`Storage.columns`)
LEAF, START, COUNT = 0, 1, 2  # tiles
T, CLOCK, SKIPPED, GO = 0, 1, 2, 3  # counters: updates made, steps seen, steps skipped, and whether this one is not
COUNTERS = 4
STEPS, TICKS = 0, 1  # advance: what a step adds to T and CLOCK of each row
ADVANCES = 2
