"""The gateway for model APIs, which adds keys and books costs, and the egress proxy.

Imports `swarm.ledger` (bills) and base helpers; `swarm.engine.egress` and the wiring import it.
"""
