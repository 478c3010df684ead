#!/bin/sh
# Reads input.json, writes output.json. The guest has python3 for JSON (and jq, if the image was built with it).
set -eu

name=$(python3 -c 'import json; print(json.load(open("input.json"))["inputs"]["name"])')
echo "greeting $name"
NAME=$name python3 -c 'import json, os; print(json.dumps({"greeting": "Hello, " + os.environ["NAME"] + "!"}))' > output.json
