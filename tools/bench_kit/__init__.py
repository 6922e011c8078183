"""What all benchmarks share: the machine, a runner of pieces, what a piece found, tables, turns, files of results."""
