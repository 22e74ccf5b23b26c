// What registration.cpp registers for conv_norm_act on the CPU. Schemas: hia_kernels/core/native.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <torch/csrc/stable/tensor.h>

namespace hia {

using torch::stable::Tensor;
using MaybeTensor = std::optional<torch::stable::Tensor>;

// "avx512", "avx2", or "" where this processor runs none of the kernels.
std::string cpu_isa();

// weight [OC, C, K, K] (turned: [C, OC, K, K]), scale [of the weight's first axis] -> out [OC, C, K * K],
// the direct form's layout.
void conv_direct_weight(const Tensor& weight, const MaybeTensor& scale, bool turned, Tensor out);

// The same for K = 3 -> out [OC, C, 16], the Winograd form's layout.
void conv_winograd_weight(const Tensor& weight, const MaybeTensor& scale, bool turned, Tensor out);

// x [N, H, W, C] -> out [N, OH, OW, OC]; out may be the residual.
void conv_direct(const Tensor& x, const Tensor& weight, const MaybeTensor& shift, const MaybeTensor& residual, int64_t stride,
          bool pad_rows, bool relu, Tensor out);

// The same for a weight of conv_winograd_weight, stride 1.
void conv_winograd(const Tensor& x, const Tensor& weight, const MaybeTensor& shift, const MaybeTensor& residual,
              bool pad_rows, bool relu, Tensor out);

// dz [N, H, W, OC], x [N, H, W, C] -> out [OC, C, 3, 3], stride 1.
void conv_winograd_weight_gradient(const Tensor& dz, const Tensor& x, Tensor out);

}  // namespace hia
