// Which native function serves which op on which device: one line an op. Schemas: hia_kernels/core/native.py.
#include <torch/csrc/stable/library.h>

#include "cpu/conv_norm_act.h"

namespace hia {

int64_t revision() { return 1; }  // hia_kernels/core/native.py: REVISION

}  // namespace hia

STABLE_TORCH_LIBRARY_IMPL(hia_native, CompositeExplicitAutograd, m) {
  m.impl("revision", TORCH_BOX(&hia::revision));
  m.impl("cpu_isa", TORCH_BOX(&hia::cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(hia_native, CPU, m) {
  m.impl("conv3x3_weight", TORCH_BOX(&hia::conv3x3_weight));
  m.impl("conv3x3", TORCH_BOX(&hia::conv3x3));
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&hia::conv3x3_weight_gradient));
}
