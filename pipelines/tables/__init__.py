"""A grid of sets, networks and seeds: what it is, how its cells are run, and the tables that are made of them."""
