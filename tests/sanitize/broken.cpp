// Faults that the sanitizers must report before their silence about csrc/ counts. Compiled by tests/sanitize alone.
#include <cstdint>
#include <new>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace {

using torch::stable::Tensor;

const float* data(const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); }

// Reads one float behind a contiguous tensor.
double read_behind(Tensor x) { return *(static_cast<const volatile float*>(data(x)) + x.numel()); }

// Writes one float behind a contiguous tensor.
double write_behind(Tensor x) {
  *(static_cast<volatile float*>(const_cast<float*>(data(x))) + x.numel()) = 1.0F;
  return 0.0;
}

// Reads memory that was given back.
double read_freed(Tensor x) {
  volatile float* p = new float[64];
  p[0] = data(x)[0];
  delete[] p;
  return p[0];
}

// Returns memory, as the kernels' workspaces are allocated, that nothing was written to.
double read_unwritten(Tensor) {
  float* p = static_cast<float*>(::operator new(64 * sizeof(float), std::align_val_t(64)));
  const double found = *static_cast<volatile float*>(p);
  ::operator delete(p, std::align_val_t(64));
  return found;
}

// Shifts 32 bits by 32 or more.
double shift_too_far(Tensor x) {
  const int by = 32 + static_cast<int>(x.numel());
  return 1 << by;
}

// Adds 1 to the largest int.
double overflow(Tensor x) {
  volatile int largest = INT32_MAX;
  const int one = static_cast<int>(x.numel() > 0);
  return largest + one;
}

}  // namespace

STABLE_TORCH_LIBRARY(hia_broken, m) {
  m.def("read_behind(Tensor x) -> float");
  m.def("write_behind(Tensor x) -> float");
  m.def("read_freed(Tensor x) -> float");
  m.def("read_unwritten(Tensor x) -> float");
  m.def("shift_too_far(Tensor x) -> float");
  m.def("overflow(Tensor x) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(hia_broken, CPU, m) {
  m.impl("read_behind", TORCH_BOX(&read_behind));
  m.impl("write_behind", TORCH_BOX(&write_behind));
  m.impl("read_freed", TORCH_BOX(&read_freed));
  m.impl("read_unwritten", TORCH_BOX(&read_unwritten));
  m.impl("shift_too_far", TORCH_BOX(&shift_too_far));
  m.impl("overflow", TORCH_BOX(&overflow));
}
