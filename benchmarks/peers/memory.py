"""`benchmarks.memory` in a process that knows the peers."""

import benchmarks.peers  # noqa: F401  (registers them)
from benchmarks.memory import main

if __name__ == "__main__":
    main()
