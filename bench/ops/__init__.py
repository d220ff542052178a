"""One file per op: its shapes, its peers, what it must move and compute. Each exports `OPS`."""
