// Fused CPU merge of attention partials: one pass over out, lse and the partial, in fp32.
//
//   out -= sigmoid(lse_b - lse) * (out - out_b);   lse -= logsigmoid(lse - lse_b)
//
// A row that no key has reached yet has lse = -inf; it takes the partial as it is. Tensors come as addresses and strides (in
// elements), so that this file needs no torch.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace py = pybind11;

namespace {

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

struct Shape {
  int64_t rows, heads, dim;
};

struct Strides {  // of [rows, heads, dim] with dim dense, and of [rows, heads]
  int64_t out_row, out_head, lse_row, lse_head;
};

template <typename Partial>
void merge_rows(float* out, float* lse, Strides a, const Partial* partial, const float* partial_lse, Strides b,
                Shape shape) {
  constexpr float kEmpty = -std::numeric_limits<float>::infinity();
  for (int64_t row = 0; row < shape.rows; ++row) {
    for (int64_t head = 0; head < shape.heads; ++head) {
      float& old_lse = lse[row * a.lse_row + head * a.lse_head];
      const float new_lse = partial_lse[row * b.lse_row + head * b.lse_head];
      if (new_lse == kEmpty) continue;
      float* o = out + row * a.out_row + head * a.out_head;
      const Partial* p = partial + row * b.out_row + head * b.out_head;
      if (old_lse == kEmpty) {
        for (int64_t i = 0; i < shape.dim; ++i) o[i] = static_cast<float>(p[i]);
        old_lse = new_lse;
        continue;
      }
      const float difference = new_lse - old_lse;
      const float small = std::exp(-std::fabs(difference));  // never overflows
      const float weight = (difference > 0 ? 1.0f : small) / (1.0f + small);
      for (int64_t i = 0; i < shape.dim; ++i) o[i] -= weight * (o[i] - static_cast<float>(p[i]));
      old_lse = std::fmax(old_lse, new_lse) + std::log1p(small);
    }
  }
}

void merge(uintptr_t out, uintptr_t lse, int64_t out_row, int64_t out_head, int64_t lse_row, int64_t lse_head,
           uintptr_t partial, uintptr_t partial_lse, int64_t b_out_row, int64_t b_out_head, int64_t b_lse_row,
           int64_t b_lse_head, int64_t rows, int64_t heads, int64_t dim, bool partial_is_bfloat16) {
  if (rows < 0 || heads < 0 || dim < 0) throw std::invalid_argument("merge: negative shape");
  const Strides a{out_row, out_head, lse_row, lse_head}, b{b_out_row, b_out_head, b_lse_row, b_lse_head};
  const Shape shape{rows, heads, dim};
  auto* o = reinterpret_cast<float*>(out);
  auto* l = reinterpret_cast<float*>(lse);
  const auto* pl = reinterpret_cast<const float*>(partial_lse);
  py::gil_scoped_release release;
  if (partial_is_bfloat16) {
    merge_rows(o, l, a, reinterpret_cast<const BFloat16*>(partial), pl, b, shape);
  } else {
    merge_rows(o, l, a, reinterpret_cast<const float*>(partial), pl, b, shape);
  }
}

}  // namespace

PYBIND11_MODULE(_merge, m) {
  m.doc() = "Fused CPU merge of attention partials.";
  m.def("merge", &merge, "Merges a partial (out, lse), given by address and strides, into an accumulator in place.");
}
