"""What tickets refer to by name: agents, workflows, schedules, webhooks, secrets; and the workers that run them.

Imports `sql` and `tickets`; `runs` and `claims` import it.
"""
