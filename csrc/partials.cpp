// Passes over rows of attention on the CPU: delta = sum(do * out), and whether an lse hides what is not finite.
//
// Each reads and writes every tensor once. Tensors come as addresses and strides (in elements), so that this file needs no
// torch. What is computed, and why, is said in attention/delta.py and attention/backends/cpu.py.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "partials.h"

namespace py = pybind11;

namespace {

using hdp::BFloat16;

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

bool is_plain(uintptr_t values, int64_t row, int64_t head, int64_t rows, int64_t heads) {
  check({rows, heads, 0});
  py::gil_scoped_release release;
  return all_plain(pointer<const float>(values), Strides{row, head}, rows, heads);
}

}  // namespace

PYBIND11_MODULE(_partials, m) {
  m.doc() = "CPU passes over rows of attention. Each tensor is an address and its strides of rows and heads.";
  m.def("delta", &delta, "delta = sum(do * out).");
  m.def("is_plain", &is_plain, "Whether every number of [rows, heads] is finite and none is 0.");
}
