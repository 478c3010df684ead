"""An attempt's life in the database: claim, lease, finish, retry, approval; and maintenance on the way.

Imports every other package of `swarm.store`; only `swarm.store.store` imports it.
"""
