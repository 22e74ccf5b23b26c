// Functions that registration.cpp registers for conv_norm_act on the CPU. Schemas: hia_kernels/core/native.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <torch/csrc/stable/tensor.h>

namespace hia {

using torch::stable::Tensor;
using MaybeTensor = std::optional<torch::stable::Tensor>;

// "avx512", "avx2", or "" where this processor supports none of the kernels.
std::string cpu_isa();

// Pack weight [OC, C, K, K], times scale [of the weight's first axis], for conv_direct: out [OC, C, K * K].
// `turned`: from [C, OC, K, K], rotated by 180 degrees, for the gradient of x.
void conv_direct_weight(const Tensor& weight, const MaybeTensor& scale, bool turned, Tensor out);

// The same for K = 3 and conv_winograd: out [OC, C, 16].
void conv_winograd_weight(const Tensor& weight, const MaybeTensor& scale, bool turned, Tensor out);

// Convolve x [N, H, W, C] -> out [N, OH, OW, OC]; out may be the residual.
void conv_direct(const Tensor& x, const Tensor& weight, const MaybeTensor& shift, const MaybeTensor& residual,
                 int64_t stride, bool pad_rows, bool relu, Tensor out);

// The same with a weight packed by conv_winograd_weight, stride 1.
void conv_winograd(const Tensor& x, const Tensor& weight, const MaybeTensor& shift, const MaybeTensor& residual,
              bool pad_rows, bool relu, Tensor out);

// Gradient of the weight: dz [N, H, W, OC], x [N, H, W, C] -> out [OC, C, 3, 3], stride 1.
void conv_winograd_weight_gradient(const Tensor& dz, const Tensor& x, Tensor out);

}  // namespace hia
