"""Programs that use the C++ kernel in processes of their own, for the tests of its build."""

USE = """
from sasa.kernels import choose_backend, cpu
from sasa.kernels.interface import AttentionOptions
x = torch.randn(1, 2, 4, 5, 5)
def use():
    backend = choose_backend(x, 3)
    if backend == "cpu":  # not by the operator: its first call imports half of torch
        cpu.forward(x, x, x, None, None, AttentionOptions(3))
    os.write(1, f"{backend}\\n".encode())  # one write: children share the pipe
"""
# Fresh processes that need not import torch again.
FORK = (
    USE
    + """
def fork(prepare=lambda: None):
    child = os.fork()
    if child == 0:
        try:
            prepare()
            use()
        except BaseException as error:
            os.write(2, f"child failed: {error!r}\\n".encode())
        os._exit(0)
    return child
"""
)
