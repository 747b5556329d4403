// Fused CPU passes over rows of attention: the merge of partials, and what stands in for out where queries have travelled.
//
//   merge            out = sigmoid(lse - lse_b) * out + sigmoid(lse_b - lse) * out_b;   lse = log(exp(lse) + exp(lse_b))
//   delta            delta = sum(do * out)
//   out_with_delta   out such that sum(do * out) = delta
//
// Each reads and writes every tensor once. Tensors come as addresses and strides (in elements), so that this file needs no
// torch. What is computed, and why, is said in attention/merge.py and attention/delta.py.
#include <pybind11/pybind11.h>

#include <algorithm>
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

// In double, where products of floats are exact and their sums neither overflow nor underflow.
template <typename Model>
float dot(const Model* a, const Model* b, int64_t dim) {
  constexpr int64_t kLanes = 8;
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane)
      sums[lane] += static_cast<double>(static_cast<float>(a[i + lane])) * static_cast<float>(b[i + lane]);
  for (; i < dim; ++i) sums[0] += static_cast<double>(static_cast<float>(a[i])) * static_cast<float>(b[i]);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return static_cast<float>(sums[0]);
}

template <typename Model>
void delta_rows(float* delta, Strides delta_at, const Model* grad, Strides grad_at, const Model* out, Strides out_at,
                Shape shape) {
  for (int64_t row = 0; row < shape.rows; ++row)
    for (int64_t head = 0; head < shape.heads; ++head)
      delta[delta_at.at(row, head)] = dot(grad + grad_at.at(row, head), out + out_at.at(row, head), shape.dim);
}

// Magnitudes of floats are in the order of their bits, and a NaN is above all of them.
int32_t magnitude(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffff;
}

int64_t largest(const float* values, int64_t dim) {
  int32_t most = -1;
  for (int64_t i = 0; i < dim; ++i) most = std::max(most, magnitude(values[i]));
  int64_t at = 0;
  while (magnitude(values[at]) != most) ++at;
  return at;
}

void out_with_delta_row(float* out, const float* grad, float delta, int64_t dim) {
  std::fill_n(out, dim, 0.0f);
  if (delta == 0 || dim == 0) return;
  const int64_t at = largest(grad, dim);
  const float alone = delta / grad[at];
  // What is not finite must be seen in the result; 0 * inf is NaN as well.
  if (std::isfinite(alone) || !std::isfinite(delta) || grad[at] == 0) {
    out[at] = alone;
    return;
  }
  double sum = 0;
  for (int64_t i = 0; i < dim; ++i) sum += std::fabs(static_cast<double>(grad[i]));
  const double each = std::min<double>(std::fabs(delta / sum), std::numeric_limits<float>::max());
  for (int64_t i = 0; i < dim; ++i)
    out[i] = std::signbit(grad[i]) == std::signbit(delta) ? static_cast<float>(each) : -static_cast<float>(each);
}

// Whether every number is finite and none is 0.
bool all_plain(const float* values, Strides at, int64_t rows, int64_t heads) {
  bool plain = true;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t head = 0; head < heads; ++head) {
      const float value = values[at.at(row, head)];
      plain &= value != 0 && std::isfinite(value);
    }
  return plain;
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

void delta(uintptr_t delta, int64_t delta_row, int64_t delta_head, uintptr_t grad, int64_t grad_row, int64_t grad_head,
           uintptr_t out, int64_t out_row, int64_t out_head, int64_t rows, int64_t heads, int64_t dim,
           bool is_bfloat16) {
  const Shape shape{rows, heads, dim};
  check(shape);
  const auto run = [&]<typename Model>(const Model* values) {
    delta_rows(pointer<float>(delta), {delta_row, delta_head}, values, {grad_row, grad_head}, pointer<const Model>(out),
               {out_row, out_head}, shape);
  };
  py::gil_scoped_release release;
  is_bfloat16 ? run(pointer<const BFloat16>(grad)) : run(pointer<const float>(grad));
}

void out_with_delta(uintptr_t out, int64_t out_row, int64_t out_head, uintptr_t grad, int64_t grad_row,
                    int64_t grad_head, uintptr_t delta, int64_t delta_row, int64_t delta_head, int64_t rows,
                    int64_t heads, int64_t dim) {
  check({rows, heads, dim});
  const Strides out_at{out_row, out_head}, grad_at{grad_row, grad_head}, delta_at{delta_row, delta_head};
  py::gil_scoped_release release;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t head = 0; head < heads; ++head)
      out_with_delta_row(pointer<float>(out) + out_at.at(row, head), pointer<const float>(grad) + grad_at.at(row, head),
                         pointer<const float>(delta)[delta_at.at(row, head)], dim);
}

bool is_plain(uintptr_t values, int64_t row, int64_t head, int64_t rows, int64_t heads) {
  check({rows, heads, 0});
  py::gil_scoped_release release;
  return all_plain(pointer<const float>(values), Strides{row, head}, rows, heads);
}

}  // namespace

PYBIND11_MODULE(_partials, m) {
  m.doc() = "Fused CPU passes over rows of attention. Each tensor is an address and its strides of rows and heads.";
  m.def("merge", &merge, "Merges a partial (out, lse) into (out, lse) in place.");
  m.def("delta", &delta, "delta = sum(do * out).");
  m.def("is_plain", &is_plain, "Whether every number of [rows, heads] is finite and none is 0.");
  m.def("out_with_delta", &out_with_delta, "Writes an out with sum(do * out) = delta.");
}
