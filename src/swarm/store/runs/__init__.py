"""The workflow engine: reads a run's state, lets the planner (`swarm.workflow.plan`) decide, writes the decision.

Imports `sql`, `tickets` and `registry`; `claims` imports it.
"""
