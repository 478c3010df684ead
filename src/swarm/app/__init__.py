"""Wiring: the only place that names concrete classes. Imports everything below; only `bench` and `cli` import it."""
