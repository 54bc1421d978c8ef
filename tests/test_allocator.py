"""Memory stays with the process: a layer's pages are there for the next one."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, threading
import numpy, zarr, torch
from tilepipe.host.allocator import compute_thread, in_main_arena, keep_memory

def layers():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (1, 7, 40, 90) * 5:
        tensor = torch.zeros(size << 18)
        del tensor
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

wait, ready = threading.Event(), threading.Barrier(4)
def other():
    held = bytearray(3_000_000)
    ready.wait()
    wait.wait()
for _ in range(3):
    threading.Thread(target=other, daemon=True).start()
ready.wait()
KEEP
with compute_thread() as pool:
    assert pool.submit(in_main_arena).result()
    pool.submit(layers).result()
    print(pool.submit(layers).result())
wait.set()
"""


def faults(keep: bool) -> int:
    program = PROGRAM.replace("KEEP", "keep_memory()" if keep else "")
    if not keep:
        program = program.replace("    assert pool", "    # pool")
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_no_page_is_faulted_in_twice_though_other_threads_had_memory_before() -> None:
    """20 tensors of up to 90 MB are 180,000 pages (fewer if huge); by default most come anew."""
    kept, anew = faults(keep=True), faults(keep=False)
    assert 10 * kept < anew
