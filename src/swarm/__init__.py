"""Swarm runs tickets from an SQL table with agents, each in its own throw-away microVM."""

__version__ = "0.1.0"
