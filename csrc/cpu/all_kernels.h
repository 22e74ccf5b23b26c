// All kernels of one instruction set; product.h says where this is included.
#pragma once

#include "direct_kernels.h"
#include "gemm_kernels.h"
#include "kernels.h"
#include "stem_kernels.h"
#include "winograd_kernels.h"

namespace hia::cpu {
namespace {

template <class Isa>
constexpr Kernels kernels_of(const char* name) {
  return {name, direct<Isa>, weight<Isa>, winograd<Isa>, winograd_weight<Isa>,
          gradient_tiles<Isa>, gradient_product<Isa>, gradient_weight<Isa>, stem<Isa>, gemm<Isa>};
}

}  // namespace
}  // namespace hia::cpu
