"""Tickets: added, listed, validated when another tool wrote them, their dependencies, changes and events.

Imports `swarm.store.sql`; the packages of `swarm.store` above it import it.
"""
