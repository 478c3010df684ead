"""What an operator does beside running tickets: packages, layers, secrets, and the proof that nothing was lost.

Imports store, agents and images; the wiring and the commands import it.
"""
