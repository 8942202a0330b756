"What all tests share."
import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def cache_of_their_own(tmp_path_factory):
    "Rendered scenes and indices of tests stay out of the user's cache."
    os.environ["MAE_REPRO_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["MAE_REPRO_CACHE"]


@pytest.fixture(scope="module")
def one_thread():
    "Models as small as those of tests run slower on more threads, and much slower when several tests share the cores."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
