"""Run notebooks in place in a real kernel: `python docs/run_nbs.py nbs/12_loss.ipynb …`

Skips what nbdev_test skips: cells with `#| eval: false` or one of settings.ini's `tst_flags`."""
import os, re, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.config import get_config

flags = '|'.join(get_config().tst_flags.split())
SKIP = re.compile(rf'^#\|\s*(eval:\s*false|{flags})\b', flags=re.M)


class Client(NotebookClient):
    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type == 'code' and SKIP.search(cell.source): return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


os.environ['IN_TEST'] = '1' # the last cell's nbdev_export() does nothing
for path in map(Path, sys.argv[1:]):
    start, nb = time.time(), nbformat.read(path, 4)
    Client(nb, timeout=600, kernel_name='python3', resources=dict(metadata=dict(path=path.parent)),
           record_timing=False, extra_arguments=['--IPKernelApp.log_level=40']).execute()
    nbformat.write(nb, path)
    print(f'{path}: {time.time() - start:.0f} s', flush=True)
