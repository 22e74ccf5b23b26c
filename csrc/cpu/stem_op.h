// Function that registration.cpp registers for stem on the CPU. Schema: hia_kernels/core/native.py.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>

namespace hia {

// Computes pixels [N, H, W, CP], window [N, 2], weight [OC / 32, (CP + 1) K K, 32] -> out [N, PH, PW, OC]; see stem.h.
void stem(const torch::stable::Tensor& pixels, const torch::stable::Tensor& window,
          const torch::stable::Tensor& weight, const torch::stable::Tensor& inside, const torch::stable::Tensor& shift,
          double centre, int64_t kernel, bool pool, torch::stable::Tensor out);

}  // namespace hia
