// conv_norm_act on the CPU: checks arguments and splits the work among torch's threads; kernels.h has the arithmetic.
#include "conv_norm_act.h"

#include "tensors.h"

namespace hia {
namespace {

using cpu::Convolution;
using cpu::kPanel;
using cpu::kPoints;

constexpr int64_t kBlockFloats = 4 << 20;  // of transformed tiles, while a weight's gradient is accumulated

constexpr Checks check{"hia::conv_norm_act"};

// Sets x and the sizes.
Convolution convolution(const Tensor& x, int64_t outputs, int64_t kernel, int64_t stride, bool pad_rows) {
  check.floats(x, "x", 4);
  Convolution p{};
  p.x = data(x);
  p.images = x.size(0), p.height = x.size(1), p.width = x.size(2), p.channels = x.size(3);
  p.outputs = outputs;
  p.kernel = kernel, p.stride = stride;
  p.left = p.kernel / 2, p.top = pad_rows ? p.left : 0;
  p.rows = (p.height + 2 * p.top - p.kernel) / stride + 1, p.columns = (p.width - 1) / stride + 1;
  check.channels(p.outputs, p.channels);
  return p;
}

void set_epilogue(Convolution& p, const MaybeTensor& shift, const MaybeTensor& residual, bool relu, const Tensor& out) {
  check.floats(out, "out", 4);
  check.size(out, "out", p.images, p.rows, p.columns, p.outputs);
  if (residual.has_value()) {
    check.floats(*residual, "residual", 4);
    check.size(*residual, "residual", p.images, p.rows, p.columns, p.outputs);
    p.residual = data(*residual);
  }
  p.shift = check.vector(shift, "shift", p.outputs);
  p.out = mutable_data(out);
  prefer_huge_pages(out);
  p.relu = relu;
}

}  // namespace

std::string cpu_isa() {
  const cpu::Kernels* found = cpu::kernels();
  return found == nullptr ? "" : found->name;
}

void conv_direct_weight(const Tensor& weight, const MaybeTensor& scale, bool turned, Tensor out) {
  check.floats(weight, "weight", 4);
  const int64_t outputs = weight.size(turned ? 1 : 0), channels = weight.size(turned ? 0 : 1), side = weight.size(3);
  check.size(weight, "weight", weight.size(0), weight.size(1), side, side);
  check.channels(outputs, channels);
  check.packed(out, "out", outputs, channels, side * side);
  const float* factors = check.vector(scale, "scale", weight.size(0));
  const cpu::Kernels& run = check.kernels();
  const float* from = data(weight);
  float* to = mutable_data(out);
  torch::stable::parallel_for(0, outputs / kPanel, 1, [&](int64_t begin, int64_t end) {
    run.weight(from, factors, to, outputs, channels, side * side, turned, begin, end);
  });
}

void conv_winograd_weight(const Tensor& weight, const MaybeTensor& scale, bool turned, Tensor out) {
  check.floats(weight, "weight", 4);
  const int64_t outputs = weight.size(turned ? 1 : 0), channels = weight.size(turned ? 0 : 1);
  check.size(weight, "weight", weight.size(0), weight.size(1), 3, 3);
  check.channels(outputs, channels);
  check.packed(out, "out", outputs, channels, kPoints);
  const float* factors = check.vector(scale, "scale", weight.size(0));
  const cpu::Kernels& run = check.kernels();
  const float* from = data(weight);
  float* to = mutable_data(out);
  torch::stable::parallel_for(0, outputs / kPanel, 1, [&](int64_t begin, int64_t end) {
    run.winograd_weight(from, factors, to, outputs, channels, turned, begin, end);
  });
}

void conv_direct(const Tensor& x, const Tensor& weight, const MaybeTensor& shift, const MaybeTensor& residual,
                 int64_t stride, bool pad_rows, bool relu, Tensor out) {
  STD_TORCH_CHECK(weight.dim() == 3 && (weight.size(2) == 1 || weight.size(2) == 9),
                  "hia::conv_norm_act: weight must be of conv_direct_weight");
  Convolution p = convolution(x, weight.size(0), weight.size(2) == 1 ? 1 : 3, stride, pad_rows);
  p.weight = check.packed(weight, "weight", p.outputs, p.channels, weight.size(2));
  set_epilogue(p, shift, residual, relu, out);
  const cpu::Kernels& run = check.kernels();
  const int64_t block = cpu::pixels_per_block(p.depth());
  torch::stable::parallel_for(0, p.pixels(), block, [&](int64_t begin, int64_t end) {
    const Floats work = allocate(cpu::direct_floats(block, p.depth()));
    run.direct(p, begin, end, work.get());
  });
}

void conv_winograd(const Tensor& x, const Tensor& weight, const MaybeTensor& shift, const MaybeTensor& residual,
              bool pad_rows, bool relu, Tensor out) {
  STD_TORCH_CHECK(weight.dim() == 3 && weight.size(2) == kPoints,
                  "hia::conv_norm_act: weight must be of conv_winograd_weight");
  Convolution p = convolution(x, weight.size(0), 3, 1, pad_rows);
  p.weight = check.packed(weight, "weight", p.outputs, p.channels, kPoints);
  set_epilogue(p, shift, residual, relu, out);
  const cpu::Kernels& run = check.kernels();
  const int64_t block = cpu::tiles_per_block(p.channels);
  torch::stable::parallel_for(0, p.tiles(), block, [&](int64_t begin, int64_t end) {
    const Floats work = allocate(cpu::winograd_floats(block, p.channels));
    run.winograd(p, begin, end, work.get());
  });
}

void conv_winograd_weight_gradient(const Tensor& dz, const Tensor& x, Tensor out) {
  check.floats(dz, "dout", 4);
  check.floats(out, "out", 4);
  Convolution p = convolution(x, out.size(0), 3, 1, true);
  check.size(out, "out", p.outputs, p.channels, 3, 3);
  check.size(dz, "dout", p.images, p.rows, p.columns, p.outputs);
  p.out = mutable_data(dz);  // only read from
  const cpu::Kernels& run = check.kernels();
  const int64_t max_block = std::max<int64_t>(64, kBlockFloats / (kPoints * (p.channels + p.outputs)));
  const int64_t blocks = (p.tiles() + max_block - 1) / max_block;
  const int64_t block = blocks ? (p.tiles() + blocks - 1) / blocks : 0;
  const Floats x_tiles = allocate(kPoints * cpu::point_stride(block, p.channels));
  const Floats dout_tiles = allocate(kPoints * cpu::point_stride(block, p.outputs));
  const Floats sums = allocate(kPoints * p.channels * p.outputs);
  const Floats zeros = allocate(std::max(p.channels, p.outputs));
  std::fill_n(sums.get(), kPoints * p.channels * p.outputs, 0.0f);
  std::fill_n(zeros.get(), std::max(p.channels, p.outputs), 0.0f);
  // a work item is one point's product with a slice of the channels
  const int64_t slice = std::min<int64_t>(p.channels, 128), slices = (p.channels + slice - 1) / slice;
  for (int64_t first = 0; first < p.tiles(); first += block) {
    const int64_t count = std::min(block, p.tiles() - first);
    torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      run.gradient_tiles(p, first, block, begin, end, zeros.get(), x_tiles.get(), dout_tiles.get());
    });
    torch::stable::parallel_for(0, kPoints * slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t channel = item % slices * slice;
        run.gradient_product(p, x_tiles.get(), dout_tiles.get(), block, count, item / slices, channel,
                             std::min(channel + slice, p.channels), sums.get());
      }
    });
  }
  float* to = mutable_data(out);
  torch::stable::parallel_for(0, p.outputs / kPanel, 1, [&](int64_t begin, int64_t end) {
    run.gradient_weight(sums.get(), to, p.outputs, p.channels, begin * kPanel, end * kPanel);
  });
}

}  // namespace hia
