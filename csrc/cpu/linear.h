// Function that registration.cpp registers for linear on the CPU. Schema: hia_kernels/core/native.py.
#pragma once

#include <optional>

#include <torch/csrc/stable/tensor.h>

namespace hia {

// Computes x [R, C], weight [D, C], of any strides, bias [D] -> out [R, D], of any row stride; `add` adds to out,
// without a bias.
void linear(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
            const std::optional<torch::stable::Tensor>& bias, torch::stable::Tensor out, bool add);

}  // namespace hia
