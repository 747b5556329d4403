// Fused CPU passes over rows of attention.
//
//   merge            out = sigmoid(lse - lse_b) * out + sigmoid(lse_b - lse) * out_b;   lse = log(exp(lse) + exp(lse_b))
//
// Each reads and writes every tensor once. Tensors come as addresses and strides (in elements), so that this file needs no
// torch. What is computed, and why, is said in attention/merge.py.
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

struct Strides {  // of [rows, heads, dim] with dim dense, or of [rows, heads]
  int64_t row, head;
  int64_t at(int64_t r, int64_t h) const { return r * row + h * head; }
};

void check(const Shape& shape) {
  if (shape.rows < 0 || shape.heads < 0 || shape.dim < 0) throw std::invalid_argument("partials: negative shape");
}

// A row that no key has reached yet has lse = -inf; it takes the partial as it is. Both sides are weighed: out -= w * (out -
// partial) would leave the rounding of a large partial behind even where it weighs nothing.
template <typename Partial>
void merge_rows(float* out, Strides out_at, float* lse, Strides lse_at, const Partial* partial, Strides partial_at,
                const float* partial_lse, Strides partial_lse_at, Shape shape) {
  constexpr float kEmpty = -std::numeric_limits<float>::infinity();
  for (int64_t row = 0; row < shape.rows; ++row) {
    for (int64_t head = 0; head < shape.heads; ++head) {
      float& old_lse = lse[lse_at.at(row, head)];
      const float new_lse = partial_lse[partial_lse_at.at(row, head)];
      if (new_lse == kEmpty) continue;
      float* o = out + out_at.at(row, head);
      const Partial* p = partial + partial_at.at(row, head);
      if (old_lse == kEmpty) {
        for (int64_t i = 0; i < shape.dim; ++i) o[i] = static_cast<float>(p[i]);
        old_lse = new_lse;
        continue;
      }
      const float difference = new_lse - old_lse;
      const float small = std::exp(-std::fabs(difference));  // never overflows
      const float more = 1.0f / (1.0f + small), less = small / (1.0f + small);
      const float old_weight = difference > 0 ? less : more, new_weight = difference > 0 ? more : less;
      for (int64_t i = 0; i < shape.dim; ++i) o[i] = old_weight * o[i] + new_weight * static_cast<float>(p[i]);
      old_lse = std::fmax(old_lse, new_lse) + std::log1p(small);
    }
  }
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void merge(uintptr_t out, int64_t out_row, int64_t out_head, uintptr_t lse, int64_t lse_row, int64_t lse_head,
           uintptr_t partial, int64_t partial_row, int64_t partial_head, uintptr_t partial_lse, int64_t partial_lse_row,
           int64_t partial_lse_head, int64_t rows, int64_t heads, int64_t dim, bool partial_is_bfloat16) {
  const Shape shape{rows, heads, dim};
  check(shape);
  const auto run = [&](const auto* values) {
    merge_rows(pointer<float>(out), {out_row, out_head}, pointer<float>(lse), {lse_row, lse_head}, values,
               {partial_row, partial_head}, pointer<const float>(partial_lse), {partial_lse_row, partial_lse_head}, shape);
  };
  py::gil_scoped_release release;
  partial_is_bfloat16 ? run(pointer<const BFloat16>(partial)) : run(pointer<const float>(partial));
}

}  // namespace

PYBIND11_MODULE(_partials, m) {
  m.doc() = "Fused CPU passes over rows of attention. Each tensor is an address and its strides of rows and heads.";
  m.def("merge", &merge, "Merges a partial (out, lse) into (out, lse) in place.");
}
