"""The training command: `deepspeed launch/train.py --ds_config configs/zero3.json`.

Also started by torchrun or as one plain process. With no other argument it runs the quick start.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Found without an installation, and never through this folder, whose file names must not shadow a package.
sys.path[0:1] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from afd.stopping import catch_stop_signals  # noqa: E402 (the path comes first)

if __name__ == "__main__":
    catch_stop_signals()  # before the imports, which take seconds
    from afd.train.launch import main

    sys.exit(main())
