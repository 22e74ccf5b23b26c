// The direct algorithm (im2col by blocks), for one instruction set; product.h says where it is included.
#pragma once

#include "product.h"

namespace hia::cpu {
namespace {

constexpr int64_t kSmallWeight = 1 << 16;  // floats of a weight that fits the second-level cache

// Stores a register tile through shift, residual and ReLU.
template <class Isa>
struct StoreEpilogue {
  const float* shift;
  const float* residual;
  float* out;
  int64_t row;
  bool relu;
  StoreEpilogue at(int64_t i, int64_t j) const {
    const int64_t offset = i * row + j;
    return {shift ? shift + j : nullptr, residual ? residual + offset : nullptr, out + offset, row, relu};
  }
  void operator()(int64_t i, int64_t j, typename Isa::V sum) const {
    const int64_t offset = i * row + j;
    Isa::store(out + offset, epilogue<Isa>(sum, shift ? shift + j : nullptr, residual ? residual + offset : nullptr,
                                           relu));
  }
};

template <class Isa>
void copy(const float* from, float* to, int64_t count) {
  for (int64_t c = 0; c < count; c += Isa::kWidth) Isa::store(to + c, Isa::load(from + c));
}

// Gathers the receptive field of output `index`: kernel * kernel * channels floats, zeros outside the image.
template <class Isa>
void gather(const Convolution& p, int64_t index, float* to) {
  const int64_t column = index % p.columns * p.stride - p.left;
  const int64_t row = index / p.columns % p.rows * p.stride - p.top;
  const float* image = p.x + index / (p.columns * p.rows) * p.height * p.width * p.channels;
  for (int64_t i = row; i < row + p.kernel; ++i)
    for (int64_t j = column; j < column + p.kernel; ++j, to += p.channels) {
      if (i >= 0 && i < p.height && j >= 0 && j < p.width)
        copy<Isa>(image + (i * p.width + j) * p.channels, to, p.channels);
      else
        for (int64_t c = 0; c < p.channels; c += Isa::kWidth) Isa::store(to + c, Isa::zero());
    }
}

// Prefetches rows that are read and written soon: waiting for them is most of a shallow convolution's time.
inline void prefetch_rows(const float* rows, int64_t count, int64_t row) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < kPanel; j += kLine) __builtin_prefetch(rows + i * row + j, 1, 2);
}

template <class Isa>
void direct(const Convolution& p, int64_t begin, int64_t end, float* work) {
  const int64_t depth = p.depth(), block = pixels_per_block(depth), panels = p.outputs / kPanel;
  const int64_t row = depth + kPad;  // strides of a large power of two map to one set of the cache
  const bool plain = p.kernel == 1 && p.stride == 1;
  const bool small = depth * p.outputs <= kSmallWeight;
  const int64_t group = small ? Isa::kRows : block;
  for (int64_t start = begin; start < end; start += block) {
    const int64_t count = end - start < block ? end - start : block;
    for (int64_t t = 0; t < count; ++t) gather<Isa>(p, start + t, work + t * row);
    for (int64_t first = 0; first < count; first += group) {
      const int64_t rows = count - first < group ? count - first : group;
      const int64_t offset = (start + first) * p.outputs;
      const StoreEpilogue<Isa> store{p.shift, p.residual ? p.residual + offset : nullptr, p.out + offset, p.outputs,
                                     p.relu};
      const int64_t left = end - start - first - rows;
      // the same rows of the next block, which are contiguous
      const float* prefetch = plain && left > block ? p.x + (start + block + first) * depth : nullptr;
      for (int64_t panel = 0; panel < panels; ++panel) {
        float* out = store.out + panel * kPanel;
        if (small)  // the next rows of this panel, or these rows of the next one
          prefetch_rows(out + rows * p.outputs, left < rows ? left : rows, p.outputs);
        else if (panel + 1 < panels)
          prefetch_rows(out + kPanel, rows, p.outputs);
        product<Isa>(rows, work + first * row, row, 1, p.weight + panel * depth * kPanel, depth,
                     store.at(0, panel * kPanel), panel ? nullptr : prefetch);
      }
    }
  }
}

template <class Isa>
void weight(const float* weight, const float* scale, float* out, int64_t outputs, int64_t channels, int64_t taps,
            bool turned, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t k = 0; k < kPanel; ++k) {
        const int64_t output = panel * kPanel + k;
        const float* from = weight + (turned ? c * outputs + output : output * channels + c) * taps;
        const float factor = scale ? scale[turned ? c : output] : 1.0f;
        float* to = out + (panel * taps * channels + c) * kPanel + k;
        for (int64_t tap = 0; tap < taps; ++tap)
          to[(turned ? taps - 1 - tap : tap) * channels * kPanel] = from[tap] * factor;
      }
}

}  // namespace
}  // namespace hia::cpu
