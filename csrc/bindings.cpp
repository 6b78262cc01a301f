#include <pybind11/pybind11.h>

PYBIND11_MODULE(_data, m) { m.doc() = "torch-free data plane"; }
