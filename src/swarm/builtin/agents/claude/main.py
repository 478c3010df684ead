"""The claude agent: one call to the Messages API with Anthropic's own SDK. agent.yaml lists its inputs and outputs.

The API's address and a token come from the environment (ANTHROPIC_BASE_URL, ANTHROPIC_API_KEY). They lead to the
gateway on the host, which holds the real key and meters use. The SDK itself waits and retries when the API is busy.
Exit status: 2 for an invalid request, 3 if the API or the gateway refused, 4 for no answer or an incomplete one.
"""

# ruff: noqa: T201

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import anthropic


def main() -> None:
    given = json.loads(Path("input.json").read_text(encoding="utf-8"))
    inputs = given["inputs"]
    messages = inputs.get("messages")
    if messages is None:
        prompt = inputs.get("prompt", given["ticket"].get("description")) or ""
        if not prompt.strip():
            fail(2, "nothing to ask: give inputs.prompt or inputs.messages, or the ticket a description")
        messages = [{"role": "user", "content": prompt}]
    request: dict[str, Any] = {
        "model": inputs.get("model", "claude-sonnet-5-5"),
        "max_tokens": inputs.get("max_tokens", 4096),
        "messages": messages,
    }
    if "system" in inputs:
        request["system"] = inputs["system"]
    if "temperature" in inputs:  # newer models don't accept it, so the SDK dropped the parameter
        request["extra_body"] = {"temperature": inputs["temperature"]}
    message = ask(request, max_retries=inputs.get("max_retries", 4))
    text = "".join(block.text for block in message.content if block.type == "text")
    made = {
        "text": text,
        "model": message.model,
        "stop_reason": message.stop_reason or "",
        "usage": message.usage.model_dump(mode="json", exclude_none=True),
    }
    Path("output.json").write_text(json.dumps(made), encoding="utf-8")


def ask(request: dict[str, Any], *, max_retries: int) -> Any:
    """The complete answer; its text is printed as it arrives."""
    address = os.environ.get("ANTHROPIC_BASE_URL", "")
    if not address or not os.environ.get("ANTHROPIC_API_KEY"):
        fail(2, "can't reach a model: the gateway has not set ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY")
    try:
        # The gateway speaks plain HTTP on the VM's own link; reading certificates would take a second without KVM.
        http = anthropic.DefaultHttpxClient(verify=address.startswith("https:"))
        client = anthropic.Anthropic(max_retries=max_retries, http_client=http)
        with client.messages.stream(**request) as stream:
            for piece in stream.text_stream:
                print(piece, end="", flush=True)
            print(flush=True)
            return stream.get_final_message()
    except anthropic.APIStatusError as error:
        fail(3, f"{error.status_code} {error.type or ''}: {error.api_message or error.message}")
    except anthropic.APIConnectionError as error:
        fail(4, f"the API can't be reached: {error.__cause__ or error}")
    except Exception as error:  # an incomplete answer may break anything in the SDK, or below it
        fail(4, f"the answer is incomplete: {type(error).__name__}: {error}")


def fail(status: int, why: str) -> NoReturn:
    print(f"claude: {why}"[:2000], file=sys.stderr, flush=True)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
