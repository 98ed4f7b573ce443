"""Quantise a GGUF file with llama.cpp: python -m lora_lab.gguf_quantise FILE OUT FTYPE

A program of its own, because llama.cpp ends the process where something is wrong. FTYPE is a constant of llama_cpp."""

import ctypes
import sys
from collections.abc import Sequence

import llama_cpp


def main(arguments: Sequence[str]) -> int:
    """Write OUT and return llama.cpp's code, which is 0 when all went well."""
    file, out, ftype = arguments
    asked = llama_cpp.llama_model_quantize_default_params()
    asked.ftype = getattr(llama_cpp, ftype)
    return int(llama_cpp.llama_model_quantize(file.encode(), out.encode(), ctypes.byref(asked)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
