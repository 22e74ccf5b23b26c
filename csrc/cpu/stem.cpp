// stem on the CPU: checks arguments and splits the result's rows among torch's threads; kernels.h has the arithmetic.
#include "stem_op.h"

#include "tensors.h"

namespace hia {
namespace {

constexpr Checks check{"hia::stem"};

cpu::Pixel pixel_type(const Tensor& pixels) {
  using torch::headeronly::ScalarType;
  if (pixels.scalar_type() == ScalarType::Byte) return cpu::Pixel::kUint8;
  if (pixels.scalar_type() == ScalarType::UInt16) return cpu::Pixel::kUint16;
  STD_TORCH_CHECK(pixels.scalar_type() == ScalarType::Float, "hia::stem: pixels must be uint8, uint16 or float32");
  return cpu::Pixel::kFloat;
}

}  // namespace

void stem(const Tensor& pixels, const Tensor& window, const Tensor& weight, const Tensor& inside, const Tensor& shift,
          double centre, int64_t kernel, bool pool, Tensor out) {
  cpu::Stem p{};
  check.contiguous(pixels, "pixels", 4);
  p.type = pixel_type(pixels), p.pixels = pixels.data_ptr();
  p.images = pixels.size(0), p.height = pixels.size(1), p.width = pixels.size(2), p.channels = pixels.size(3);
  p.kernel = kernel, p.pool = pool, p.centre = static_cast<float>(centre);
  check.floats(weight, "weight", 3);
  p.outputs = weight.size(0) * weight.size(2);
  STD_TORCH_CHECK(kernel % 2 == 1 && weight.size(1) == p.depth() && weight.size(2) == cpu::kPanel,
                  "hia::stem: weight must have shape [OC / 32, ", p.depth(), ", 32], got [", weight.size(0), ", ",
                  weight.size(1), ", ", weight.size(2), "]");
  p.weight = data(weight);
  p.inside = check.vector(inside, "inside", p.outputs), p.shift = check.vector(shift, "shift", p.outputs);
  check.floats(window, "window", 2);
  STD_TORCH_CHECK(window.size(0) == p.images && window.size(1) == 2, "hia::stem: window must have shape [N, 2]");
  p.window = data(window);
  check.floats(out, "out", 4);
  check.size(out, "out", p.images, p.out_rows(), p.out_columns(), p.outputs);
  p.out = mutable_data(out);
  prefer_huge_pages(out);
  const cpu::Kernels& run = check.kernels();
  torch::stable::parallel_for(0, p.images * p.out_rows(), 8, [&](int64_t begin, int64_t end) {
    const Floats work = allocate(cpu::stem_floats(p));
    run.stem(p, begin, end, work.get());
  });
}

}  // namespace hia
