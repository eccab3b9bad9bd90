"""`chunked` on any input: output and gradients within twice the error of the recurrence in the same precision."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigla import bigla

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
hypothesis = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def check(data, max_length, draw_case, check_budget) -> None:
    inputs, _ = draw_case(data, max_length, DTYPES)
    check_budget(lambda *x: bigla(*x, impl='chunked'), inputs, 4, peer='reference')


@settings(hypothesis, max_examples=25)
@given(data=st.data())
def test_random_cases(data, draw_case, check_budget):
    check(data, 200, draw_case, check_budget)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(hypothesis, max_examples=500)
@given(data=st.data())
def test_500_random_cases(data, draw_case, check_budget):
    check(data, 5000, draw_case, check_budget)
