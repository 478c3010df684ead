"""Helpers that know nothing of Swarm's nouns: asyncio, clock, processes, logs, JSON, YAML with positions, crash points.

Every module except `swarm.model` and `swarm.errors` may import them.
"""
