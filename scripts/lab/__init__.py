"""Nine rooms: base, config, machine, data, method, models, engine, outputs, study, in this order.

A room imports from those before it alone, and never `train_ast` or a command.
"""

import os
import sys
from importlib.util import find_spec

# torch's threads wait for each other by spinning. On two cores with other work, spinning without
# end made the digits run more than ten times slower; a bound costs it some 10 % on an idle machine.
# It is read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if missing := [
    name
    for name in ("dotenv", "filelock", "numpy", "pydantic", "torch", "tqdm", "yaml")
    if find_spec(name) is None
]:
    sys.stderr.write(
        f"error: package {missing[0]} is missing: source .venv/bin/activate, or install "
        f"requirements.txt\n"
    )
    sys.exit(2)
