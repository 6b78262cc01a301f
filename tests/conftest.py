import os
import sys
import traceback
from collections.abc import Iterator

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Ends a pytest-xdist worker whose CUDA context a kernel has broken, so that the tests after it get a new one.

    An illegal access is only seen at a later synchronisation, and every call after it fails: this one waits for the
    test that is to blame. pytest-xdist reports it as crashed and replaces the worker.
    """
    try:
        return (yield)
    finally:
        if item.get_closest_marker("gpu") and torch.cuda.is_initialized() and "PYTEST_XDIST_WORKER" in os.environ:
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                print(f"\n{item.nodeid}: broke its CUDA context", file=sys.stderr)
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(3)  # no destructor can run on a broken context
