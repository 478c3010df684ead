"""The official SDK in both dialects, streamed and whole, as its own examples use it. Prints what it got, as JSON."""
# ruff: noqa: T201 - a program

import json

import openai

MODEL = "claude-haiku-4-5"


def main() -> None:
    client = openai.OpenAI(max_retries=1)  # finds the gateway and its token in the environment
    message = {"role": "user", "content": "A haiku"}
    said = []
    whole = client.chat.completions.create(model=MODEL, messages=[message])
    said.append(whole.choices[0].message.content)
    text = ""
    for chunk in client.chat.completions.create(model=MODEL, messages=[message], stream=True):
        text += chunk.choices[0].delta.content or ""  # as everybody writes it
    said.append(text.strip())
    used = None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(model=MODEL, messages=[message], stream=True, stream_options=options):
        used = chunk.usage or used
    answer = client.responses.create(model=MODEL, input="A haiku", max_output_tokens=500)
    said.append(answer.output_text)
    with client.responses.stream(model=MODEL, input="A haiku") as stream:
        for _ in stream:
            pass
        said.append(stream.get_final_response().output_text)
    print(json.dumps({"said": said, "used": used and used.prompt_tokens}))


main()
