"""Connections, the two threads that own them, table definitions, rows as values, and waking on commits.

The rest of `swarm.store` imports it; nobody else does, but for `rows` (values) and `wake`.
"""
