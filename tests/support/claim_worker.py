"""A process that joins a job, claims a folder of its own with --resume=auto, prints the answer."""

import pathlib
import sys

from speciarl_jax.config.schema import Config
from speciarl_jax.devices import processes
from speciarl_jax.run.storage import open_run_dir
from speciarl_jax.run.workdir import claimed_workdir

if __name__ == "__main__":
    port, count, index = (int(x) for x in sys.argv[1:4])
    processes.connect(f"127.0.0.1:{port}", count, index)
    folder = pathlib.Path(sys.argv[4]) / str(index)
    folder.mkdir(exist_ok=True)
    with claimed_workdir(open_run_dir(folder), Config(), "auto") as is_resumed:
        print(is_resumed)
