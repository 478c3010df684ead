"""The database: `store.Store` is everything that can be asked of it; the packages below it are how it is answered.

The engine, the API and the commands import `swarm.store.store`; values come from `swarm.store.sql.rows`.
"""
