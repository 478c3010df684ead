"""Tickets: adding, listing, validation of rows that another tool wrote, dependencies, changes and events.

Imports `swarm.store.sql`; the packages of `swarm.store` above it import it.
"""
