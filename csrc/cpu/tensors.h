// Checks of the CPU functions' tensors, and their workspace.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels.h"

namespace hia {

using torch::stable::Tensor;
using MaybeTensor = std::optional<torch::stable::Tensor>;

struct Free {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float, Free>;

inline Floats allocate(int64_t count) {
  return Floats(static_cast<float*>(::operator new(sizeof(float) * count, std::align_val_t(64))));
}

inline const float* data(const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); }
inline float* mutable_data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

constexpr uintptr_t kHugePage = 2 << 20;

// Asks Linux for huge pages where a result is about to be written: memory that the C library has just got from the
// system is otherwise faulted in page by page, which shows in products of few terms, such as weights' gradients.
// Nothing outside the tensor is affected, and a system without huge pages goes on as before.
inline void prefer_huge_pages([[maybe_unused]] const Tensor& out) {
#if defined(MADV_HUGEPAGE)
  int64_t last = 0;
  for (int64_t i = 0; i < out.dim(); ++i) {
    if (out.size(i) == 0) return;
    last += (out.size(i) - 1) * out.stride(i);
  }
  const uintptr_t from = reinterpret_cast<uintptr_t>(out.data_ptr());
  const uintptr_t first = (from + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (from + (last + 1) * sizeof(float)) / kHugePage * kHugePage;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// Checks for one op, whose name begins each message.
struct Checks {
  const char* op;

  const cpu::Kernels& kernels() const {
    const cpu::Kernels* found = cpu::kernels();
    STD_TORCH_CHECK(found != nullptr, op, ": the native kernels need AVX2 and FMA, which this processor has not");
    return *found;
  }

  void floats(const Tensor& tensor, const char* name, int64_t dim) const {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == torch::headeronly::ScalarType::Float, op, ": ", name,
                    " must be float32 on the CPU");
    contiguous(tensor, name, dim);
  }

  void contiguous(const Tensor& tensor, const char* name, int64_t dim) const {
    STD_TORCH_CHECK(tensor.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got ", tensor.dim());
    STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  }

  void channels(int64_t outputs, int64_t channels) const {
    STD_TORCH_CHECK(outputs > 0 && outputs % cpu::kPanel == 0 && channels > 0 && channels % cpu::kLanes == 0, op,
                    ": outputs must be a multiple of 32 and channels of 16, got ", outputs, " and ", channels);
  }

  void size(const Tensor& tensor, const char* name, int64_t a, int64_t b, int64_t c, int64_t d) const {
    STD_TORCH_CHECK(tensor.size(0) == a && tensor.size(1) == b && tensor.size(2) == c && tensor.size(3) == d, op, ": ",
                    name, " must have shape [", a, ", ", b, ", ", c, ", ", d, "], got [", tensor.size(0), ", ",
                    tensor.size(1), ", ", tensor.size(2), ", ", tensor.size(3), "]");
  }

  const float* packed(const Tensor& tensor, const char* name, int64_t outputs, int64_t channels, int64_t points) const {
    floats(tensor, name, 3);
    STD_TORCH_CHECK(tensor.size(0) == outputs && tensor.size(1) == channels && tensor.size(2) == points, op, ": ", name,
                    " must have shape [", outputs, ", ", channels, ", ", points, "], got [", tensor.size(0), ", ",
                    tensor.size(1), ", ", tensor.size(2), "]");
    return data(tensor);
  }

  const float* vector(const Tensor& tensor, const char* name, int64_t count) const {
    floats(tensor, name, 1);
    STD_TORCH_CHECK(tensor.size(0) == count, op, ": ", name, " must have ", count, " entries, got ", tensor.size(0));
    return data(tensor);
  }

  const float* vector(const MaybeTensor& tensor, const char* name, int64_t count) const {
    return tensor.has_value() ? vector(*tensor, name, count) : nullptr;
  }
};

}  // namespace hia
