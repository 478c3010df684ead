"""Claude Code by the Claude Agent SDK: ``claude_code.py PROMPT`` in the directory that it is to work in."""
# ruff: noqa: T201 - a program

import asyncio
import sys

import claude_agent_sdk


async def main() -> None:
    options = claude_agent_sdk.ClaudeAgentOptions(
        model="claude-haiku-4-5", permission_mode="bypassPermissions", allowed_tools=["Bash"], setting_sources=[]
    )
    async for message in claude_agent_sdk.query(prompt=sys.argv[1], options=options):
        if isinstance(message, claude_agent_sdk.ResultMessage):
            print(message.result)
            raise SystemExit(int(message.is_error))


asyncio.run(main())
