"""The life of an attempt in the database: claim, lease, finish, retry, approval; and maintenance by claims.

Imports every other package of `swarm.store`; only `swarm.store.store` imports it.
"""
