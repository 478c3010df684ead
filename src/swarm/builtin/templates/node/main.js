// Reads input.json, writes output.json. What it prints shows up live in `swarm ticket logs -f`.
"use strict";
const fs = require("fs");

const { inputs } = JSON.parse(fs.readFileSync("input.json", "utf8"));
console.log(`greeting ${inputs.name}`);
fs.writeFileSync("output.json", JSON.stringify({ greeting: `Hello, ${inputs.name}!` }));
