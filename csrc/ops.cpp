// The schema of every torch op of forge_core, once. Implementations: csrc/cpu/<op>.cpp and csrc/cuda/<op>.cu;
// shapes, dtypes and meaning: the docstring of kernels/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(forge, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float weight_offset, bool need_dweight)"
      " -> (Tensor dx, Tensor dweight)");
  m.def("rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor q, Tensor k)");
  m.def("swiglu(Tensor gate, Tensor up, str activation) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup)");
}
