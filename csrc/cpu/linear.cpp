// linear on the CPU: checks arguments and splits the columns among torch's threads; kernels.h has the arithmetic.
#include "linear.h"

#include "tensors.h"

namespace hia {
namespace {

constexpr Checks check{"hia::linear"};

void matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == torch::headeronly::ScalarType::Float,
                  "hia::linear: ", name, " must be float32 on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 2, "hia::linear: ", name, " must have 2 dimensions, got ", tensor.dim());
}

}  // namespace

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Tensor out, bool add) {
  matrix(x, "x");
  matrix(weight, "weight");
  matrix(out, "out");
  cpu::Gemm p{};
  p.rows = x.size(0), p.depth = x.size(1), p.columns = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == p.depth, "hia::linear: weight must have ", p.depth, " columns, got ",
                  weight.size(1));
  STD_TORCH_CHECK(out.size(0) == p.rows && out.size(1) == p.columns, "hia::linear: out must have shape [", p.rows, ", ",
                  p.columns, "], got [", out.size(0), ", ", out.size(1), "]");
  STD_TORCH_CHECK((p.columns <= 1 || out.stride(1) == 1) && (p.rows <= 1 || out.stride(0) >= p.columns),
                  "hia::linear: out's columns must lie one after the other and its rows apart, got strides [",
                  out.stride(0), ", ", out.stride(1), "]");
  STD_TORCH_CHECK(!(add && bias.has_value()), "hia::linear: bias must be None where out is added to");
  STD_TORCH_CHECK(p.depth > 0, "hia::linear: x must have at least one column");
  p.a = data(x), p.a_row_stride = x.stride(0), p.a_col_stride = x.stride(1);
  p.b = data(weight), p.b_row_stride = weight.stride(0), p.b_col_stride = weight.stride(1);
  p.bias = check.vector(bias, "bias", p.columns);
  p.c = mutable_data(out), p.c_row_stride = out.stride(0), p.add = add;
  if (!add) prefer_huge_pages(out);
  const cpu::Kernels& run = check.kernels();
  torch::stable::parallel_for(0, (p.columns + cpu::kPanel - 1) / cpu::kPanel, 1, [&](int64_t begin, int64_t end) {
    const Floats work = allocate(cpu::gemm_floats(end - begin));
    run.gemm(p, begin, end, work.get());
  });
}

}  // namespace hia
