// Registers the native functions by device, one line each. Schemas: hia_kernels/core/native.py.
#include <torch/csrc/stable/library.h>

#include "cpu/conv_norm_act.h"
#include "cpu/linear.h"
#include "cpu/stem_op.h"

namespace hia {

int64_t revision() { return 5; }  // hia_kernels/core/native.py: REVISION

}  // namespace hia

STABLE_TORCH_LIBRARY_IMPL(hia_native, CompositeExplicitAutograd, m) {
  m.impl("revision", TORCH_BOX(&hia::revision));
  m.impl("cpu_isa", TORCH_BOX(&hia::cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(hia_native, CPU, m) {
  m.impl("conv_direct_weight", TORCH_BOX(&hia::conv_direct_weight));
  m.impl("conv_winograd_weight", TORCH_BOX(&hia::conv_winograd_weight));
  m.impl("conv_direct", TORCH_BOX(&hia::conv_direct));
  m.impl("conv_winograd", TORCH_BOX(&hia::conv_winograd));
  m.impl("conv_winograd_weight_gradient", TORCH_BOX(&hia::conv_winograd_weight_gradient));
  m.impl("stem", TORCH_BOX(&hia::stem));
  m.impl("linear", TORCH_BOX(&hia::linear));
}
