"""mini-swe-agent, which calls models by LiteLLM: ``mini_swe.py MODEL TASK`` in the directory that it is to work in."""
# ruff: noqa: T201 - a program

import sys

from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel

agent = DefaultAgent(
    LitellmModel(model_name=sys.argv[1], cost_tracking="ignore_errors"),
    LocalEnvironment(),
    system_template="You are a helpful assistant that uses a shell.",
    instance_template="{{task}}",
    step_limit=5,
    cost_limit=1.0,
)
print(agent.run(sys.argv[2]))
