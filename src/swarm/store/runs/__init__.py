"""The workflow engine: reads the state of a run, has the planner (`swarm.workflow.plan`) decide, writes the decision.

Imports `sql`, `tickets` and `registry`; `claims` imports it.
"""
