"""The agents of the kill campaigns."""

from __future__ import annotations

# What agents do, and how often (WEIGHTS). They are idempotent, so they may be retried after their VM was killed.
CODE = {
    "quick": "out({'n': 1})",
    "talks": "for i in range(50): print('line', i, flush=True)\nout({'n': 50})",
    "slow": "time.sleep(random.uniform(0.2, 1.5))\nout({'slow': True})",
    "fails": "print('I fail')\nsys.exit(3)",
    "flaky": "out({})\nsys.exit(random.random() < 0.5)",
    "hangs": "time.sleep(600)",
    "silent": "pass",
    # Not drawn: as many as --guilty says. It kills the engine that runs it.
    "guilty": "pid = os.getpid()\n"
    "while b'swarm.cli.engine' not in open(f'/proc/{pid}/cmdline', 'rb').read():\n"
    "    pid = int(open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1])\n"
    "os.kill(pid, 9)",
}
WEIGHTS = {"quick": 40, "talks": 15, "slow": 25, "fails": 5, "flaky": 8, "hangs": 4, "silent": 3}
INNOCENT = ("quick", "talks", "slow")  # they end as done, whatever happens around them
HEAD = "import json, os, random, sys, time\ndef out(v): json.dump(v, open('output.json', 'w'))\n"
