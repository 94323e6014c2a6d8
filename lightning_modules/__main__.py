import os
import sys

from lightning_modules.running import preemption

if __name__ == "__main__":
    preemption.watch()
    if not os.environ.get("LOCAL_RANK"):  # the imports take seconds
        print("UniRecon is loading PyTorch and Lightning.", file=sys.stderr, flush=True)
    from lightning_modules.running.command_line import main

    main()
