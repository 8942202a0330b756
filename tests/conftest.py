"What all tests share."
import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_of_their_own(tmp_path_factory):
    "Rendered scenes and indices of tests stay out of the user's cache."
    os.environ["MAE_REPRO_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["MAE_REPRO_CACHE"]
