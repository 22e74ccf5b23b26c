// What registration.cpp registers for conv_norm_act on the CPU. Schemas: hia_kernels/core/native.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <torch/csrc/stable/tensor.h>

namespace hia {

using torch::stable::Tensor;

// "avx512", "avx2", or "" where this processor runs none of the kernels.
std::string cpu_isa();

// weight [outputs, channels, 3, 3], scale [of the weight's first axis] -> out, 16 points a tap's channel pair.
void conv3x3_weight(const Tensor& weight, const std::optional<Tensor>& scale, bool turned, Tensor out);

// x [N, H, W, C] -> out [N, OH, OW, OC]; out may be the residual.
void conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& shift,
              const std::optional<Tensor>& residual, bool pad_rows, bool relu, Tensor out);

// dz [N, H, W, OC], x [N, H, W, C] -> out [OC, C, 3, 3].
void conv3x3_weight_gradient(const Tensor& dz, const Tensor& x, Tensor out);

}  // namespace hia
