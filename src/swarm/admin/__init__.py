"""Tasks of an operator besides running tickets: packages, layers, secrets, and the audit (`prove`).

Imports store, agents and images; the wiring and the commands import it.
"""
