"""Repairs of Triton's interpreter, the same for every version from 3.3 to 3.9.

bf16 is kept as raw 16-bit numbers: the interpreter's product multiplies those, its rounding from fp32 cuts the last
bits off, and an integer becomes the number of that bit pattern. A GPU does none of this. Up to 3.6 a computed bound of
a loop, an array of one number, cannot become an integer under numpy 2.4. Up to 3.8 it has no constants in bf16.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 as uint16 -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 as uint16, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


@functools.cache
def repair() -> None:
    """For this process, from now on."""
    create_dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float
    patch_tensor, patch = interpreter._patch_lang_tensor, interpreter._patch_lang

    def dot(self, a, b, total, *options):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(widen(x.data), tl.float32) for x in (a, b))
        return create_dot(self, a, b, total, *options)

    def rounding(x, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            return narrow(x)
        if source == tl.bfloat16 and target == tl.float32:
            return widen(x)
        return convert(x, source, target, mode)

    def from_integer(self, x, target):
        if target.scalar == tl.bfloat16:
            return interpreter.TensorHandle(narrow(x.data.astype(np.float32)), tl.bfloat16)
        return self.cast_impl(x, target)

    def constant(self, value):
        return interpreter.TensorHandle(narrow(np.array([value], np.float32)), tl.bfloat16)

    def with_index(tensor, *scope):
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def patch_once(function):
        """Not again at each call of a function inside a kernel: that was a third of the interpreter's time."""
        modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        return patch(function) if any(tl.core.is_builtin(module.arange) for module in modules) else None

    if not hasattr(interpreter.InterpreterBuilder, "get_int1_ty"):
        interpreter.InterpreterBuilder.get_int1_ty = lambda self: tl.int1
    interpreter.InterpreterBuilder.get_bf16 = constant
    interpreter._patch_lang = patch_once
    interpreter._patch_lang_tensor = with_index
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.create_si_to_fp = from_integer
    interpreter.InterpreterBuilder.create_ui_to_fp = from_integer
    interpreter._convert_float = rounding
