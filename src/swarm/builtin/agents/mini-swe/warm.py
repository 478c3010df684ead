"""Preloaded (agent.yaml): imports mini-swe-agent and LiteLLM in the template, which takes most of a minute without KVM.

Their settings come first, because both look for them at import: LiteLLM would ask the internet for its price list, and
mini-swe-agent makes a directory for its own settings and prints a greeting.
"""

import os
import shutil

_PLACE = "/tmp/mini-swe-settings"
os.environ |= {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "MSWEA_GLOBAL_CONFIG_DIR": _PLACE,
    "MSWEA_SILENT_STARTUP": "1",
}

import h11  # noqa: E402
import httpcore  # noqa: E402
import litellm.litellm_core_utils.default_encoding  # noqa: E402
import litellm.llms.anthropic.completion.transformation  # noqa: E402
import litellm.proxy._types  # noqa: E402
from minisweagent.agents import default  # noqa: E402
from minisweagent.environments import local  # noqa: E402
from minisweagent.models import litellm_model  # noqa: E402

shutil.rmtree(_PLACE, ignore_errors=True)

__all__ = ["default", "h11", "httpcore", "litellm", "litellm_model", "local"]
