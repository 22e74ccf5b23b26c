// conv_norm_act on the CPU: arguments checked, work split among torch's threads; the arithmetic is in conv.h.
#include "conv_norm_act.h"

#include <algorithm>
#include <memory>
#include <new>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "conv.h"

namespace hia {
namespace {

using conv::Convolution;
using conv::kPanel;
using conv::kPoints;

constexpr int64_t kBlockFloats = 4 << 20;  // of transformed tiles, while a weight's gradient is summed up

struct Free {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float, Free>;

Floats allocate(int64_t count) {
  return Floats(static_cast<float*>(::operator new(sizeof(float) * count, std::align_val_t(64))));
}

const conv::Kernels& kernels() {
  const conv::Kernels* found = conv::kernels();
  STD_TORCH_CHECK(found != nullptr, "hia::conv_norm_act: the native kernels need AVX2 and FMA, this processor has not");
  return *found;
}

void check_floats(const Tensor& tensor, const char* name, int64_t dim) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == torch::headeronly::ScalarType::Float,
                  "hia::conv_norm_act: ", name, " must be float32 on the CPU");
  STD_TORCH_CHECK(tensor.dim() == dim, "hia::conv_norm_act: ", name, " must have ", dim, " dimensions, got ",
                  tensor.dim());
  STD_TORCH_CHECK(tensor.is_contiguous(), "hia::conv_norm_act: ", name, " must be contiguous");
}

const float* data(const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); }
float* mutable_data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

void check_channels(int64_t outputs, int64_t channels) {
  STD_TORCH_CHECK(outputs > 0 && outputs % kPanel == 0 && channels > 0 && channels % conv::kLanes == 0,
                  "hia::conv_norm_act: outputs must be a multiple of 32 and channels of 16, got ", outputs, " and ",
                  channels);
}

void check_size(const Tensor& tensor, const char* name, int64_t a, int64_t b, int64_t c, int64_t d) {
  STD_TORCH_CHECK(tensor.size(0) == a && tensor.size(1) == b && tensor.size(2) == c && tensor.size(3) == d,
                  "hia::conv_norm_act: ", name, " must have shape [", a, ", ", b, ", ", c, ", ", d, "], got [",
                  tensor.size(0), ", ", tensor.size(1), ", ", tensor.size(2), ", ", tensor.size(3), "]");
}

const float* vector(const MaybeTensor& tensor, const char* name, int64_t count) {
  if (!tensor.has_value()) return nullptr;
  check_floats(*tensor, name, 1);
  STD_TORCH_CHECK(tensor->size(0) == count, "hia::conv_norm_act: ", name, " must have ", count, " entries, got ",
                  tensor->size(0));
  return data(*tensor);
}

// Sizes, x and the epilogue. A weight's last axis is K, or 4 for the Winograd form.
Convolution convolution(const Tensor& x, const Tensor& weight, int64_t stride, bool pad_rows) {
  check_floats(x, "x", 4);
  check_floats(weight, "weight", 4);
  Convolution p{};
  p.x = data(x), p.weight = data(weight);
  p.images = x.size(0), p.height = x.size(1), p.width = x.size(2), p.channels = x.size(3);
  p.outputs = weight.size(0);
  p.kernel = weight.size(3) == 4 ? 3 : weight.size(3), p.stride = stride;
  p.left = p.kernel / 2, p.top = pad_rows ? p.left : 0;
  p.rows = (p.height + 2 * p.top - p.kernel) / stride + 1, p.columns = (p.width - 1) / stride + 1;
  check_channels(p.outputs, p.channels);
  check_size(weight, "weight", p.outputs, p.channels, weight.size(3), weight.size(3));
  return p;
}

void finish(Convolution& p, const MaybeTensor& shift, const MaybeTensor& residual, bool relu, const Tensor& out) {
  check_floats(out, "out", 4);
  check_size(out, "out", p.images, p.rows, p.columns, p.outputs);
  if (residual.has_value()) {
    check_floats(*residual, "residual", 4);
    check_size(*residual, "residual", p.images, p.rows, p.columns, p.outputs);
    p.residual = data(*residual);
  }
  p.shift = vector(shift, "shift", p.outputs);
  p.out = mutable_data(out);
  p.relu = relu;
}

}  // namespace

std::string cpu_isa() {
  const conv::Kernels* found = conv::kernels();
  return found == nullptr ? "" : found->name;
}

void conv_direct_weight(const Tensor& weight, const MaybeTensor& scale, bool turned, Tensor out) {
  check_floats(weight, "weight", 4);
  const int64_t outputs = weight.size(turned ? 1 : 0), channels = weight.size(turned ? 0 : 1), side = weight.size(3);
  check_size(weight, "weight", weight.size(0), weight.size(1), side, side);
  check_channels(outputs, channels);
  check_floats(out, "out", 4);
  check_size(out, "out", outputs, channels, side, side);
  const float* factors = vector(scale, "scale", weight.size(0));
  const conv::Kernels& run = kernels();
  const float* from = data(weight);
  float* to = mutable_data(out);
  torch::stable::parallel_for(0, outputs / kPanel, 1, [&](int64_t begin, int64_t end) {
    run.weight(from, factors, to, outputs, channels, side * side, turned, begin, end);
  });
}

void conv_winograd_weight(const Tensor& weight, const MaybeTensor& scale, bool turned, Tensor out) {
  check_floats(weight, "weight", 4);
  const int64_t outputs = weight.size(turned ? 1 : 0), channels = weight.size(turned ? 0 : 1);
  check_size(weight, "weight", weight.size(0), weight.size(1), 3, 3);
  check_channels(outputs, channels);
  check_floats(out, "out", 4);
  check_size(out, "out", outputs, channels, 4, 4);
  const float* factors = vector(scale, "scale", weight.size(0));
  const conv::Kernels& run = kernels();
  const float* from = data(weight);
  float* to = mutable_data(out);
  torch::stable::parallel_for(0, outputs / kPanel, 1, [&](int64_t begin, int64_t end) {
    run.winograd_weight(from, factors, to, outputs, channels, turned, begin, end);
  });
}

void conv_direct(const Tensor& x, const Tensor& weight, const MaybeTensor& shift, const MaybeTensor& residual, int64_t stride,
          bool pad_rows, bool relu, Tensor out) {
  Convolution p = convolution(x, weight, stride, pad_rows);
  finish(p, shift, residual, relu, out);
  const conv::Kernels& run = kernels();
  const int64_t at_once = conv::pixels_at_once(p.depth());
  torch::stable::parallel_for(0, p.pixels(), at_once, [&](int64_t begin, int64_t end) {
    const Floats work = allocate(conv::direct_floats(at_once, p.depth()));
    run.direct(p, begin, end, work.get());
  });
}

void conv_winograd(const Tensor& x, const Tensor& weight, const MaybeTensor& shift, const MaybeTensor& residual,
              bool pad_rows, bool relu, Tensor out) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(3) == 4, "hia::conv_norm_act: weight must be of conv_winograd_weight");
  Convolution p = convolution(x, weight, 1, pad_rows);
  finish(p, shift, residual, relu, out);
  const conv::Kernels& run = kernels();
  const int64_t at_once = conv::tiles_at_once(p.channels);
  torch::stable::parallel_for(0, p.tiles(), at_once, [&](int64_t begin, int64_t end) {
    const Floats work = allocate(conv::winograd_floats(at_once, p.channels));
    run.winograd(p, begin, end, work.get());
  });
}

void conv_winograd_weight_gradient(const Tensor& dz, const Tensor& x, Tensor out) {
  check_floats(dz, "dout", 4);
  Convolution p = convolution(x, out, 1, true);
  check_size(out, "out", p.outputs, p.channels, 3, 3);
  check_size(dz, "dout", p.images, p.rows, p.columns, p.outputs);
  p.out = mutable_data(dz);  // only read
  const conv::Kernels& run = kernels();
  const int64_t most = std::max<int64_t>(64, kBlockFloats / (kPoints * (p.channels + p.outputs)));
  const int64_t blocks = (p.tiles() + most - 1) / most;
  const int64_t block = blocks ? (p.tiles() + blocks - 1) / blocks : 0;
  const Floats seen = allocate(kPoints * conv::point_stride(block, p.channels));
  const Floats grads = allocate(kPoints * conv::point_stride(block, p.outputs));
  const Floats sums = allocate(kPoints * p.channels * p.outputs);
  const Floats zeros = allocate(std::max(p.channels, p.outputs));
  std::fill_n(sums.get(), kPoints * p.channels * p.outputs, 0.0f);
  std::fill_n(zeros.get(), std::max(p.channels, p.outputs), 0.0f);
  // a share is one point's product with some of the channels
  const int64_t slice = std::min<int64_t>(p.channels, 128), slices = (p.channels + slice - 1) / slice;
  for (int64_t first = 0; first < p.tiles(); first += block) {
    const int64_t count = std::min(block, p.tiles() - first);
    torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      run.gradient_tiles(p, first, block, begin, end, zeros.get(), seen.get(), grads.get());
    });
    torch::stable::parallel_for(0, kPoints * slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t share = begin; share < end; ++share) {
        const int64_t channel = share % slices * slice;
        run.gradient_product(p, seen.get(), grads.get(), block, count, share / slices, channel,
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
