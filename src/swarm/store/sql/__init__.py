"""Connections, the two threads that own them, table definitions, rows as values, and waking on commits.

The rest of `swarm.store` imports it. Other packages import only `rows` (values) and `wake`.
"""
