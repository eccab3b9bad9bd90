"""The Triton kernels on any input, on a GPU: output and gradients within twice the error of `chunked`."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from bigla import bigla

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Where log2(e) g, which is rounded, is large; elsewhere some more than one, since few numbers have no average.
ROUNDINGS = {'strong': 8, 'constant': 50}
# More in float32, whose products are three of tf32: a lone one, with no other to average, is off by up to 9.2 roundings
# (`test_a_product_of_three_tf32`), and in a gradient two follow one another. One token, or strong gates, leave it so.
SPLIT = 19
# A failing case is not made smaller: each step of that would compile kernels of its own.
hypothesis = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)


def check(data, max_length, draw_case, check_budget) -> None:
    inputs, gates = draw_case(data, max_length, DTYPES)
    inputs = [x.detach().cuda().requires_grad_() for x in inputs]  # strides are kept
    oracle = 'reference' if inputs[0].shape[1] <= 300 else 'chunked'
    roundings = ROUNDINGS.get(gates, 4) + SPLIT * (inputs[0].dtype == torch.float32)
    check_budget(lambda *x: bigla(*x, impl='triton'), inputs, roundings, oracle=oracle)


@settings(hypothesis, max_examples=25)
@given(data=st.data())
def test_random_cases(data, draw_case, check_budget):
    check(data, 200, draw_case, check_budget)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize('part', range(25))
def test_500_random_cases(part, draw_case, check_budget):
    """In parts, for processes: each case has widths and dtypes of its own, which take seconds to compile."""

    @seed(part)
    @settings(hypothesis, max_examples=20)
    @given(data=st.data())
    def run(data):
        check(data, 5000, draw_case, check_budget)

    run()
