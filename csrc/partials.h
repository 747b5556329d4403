// What is done to one row of attention: the merge of a partial, and what stands in for out where queries have travelled.
// What is computed, and why, is said in attention/merge.py and attention/delta.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace hdp {

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  BFloat16& operator=(float value) {  // to nearest, ties to even; NaN stays NaN
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    bits = std::isnan(value) ? 0x7fc0 : static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    return *this;
  }
};

struct Float16 {
  uint16_t bits;
  operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, rest = bits & 1023;
    float value;
    if (exponent == 0) {
      value = std::ldexp(static_cast<float>(rest), -24);
      return sign ? -value : value;
    }
    const uint32_t wide = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | rest << 13;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  Float16& operator=(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    const uint16_t sign = static_cast<uint16_t>(wide >> 16 & 0x8000);
    const float size = std::fabs(value);
    if (std::isnan(value)) {
      bits = sign | 0x7e00;
    } else if (size >= 65520.0f) {
      bits = sign | 0x7c00;
    } else if (size < 6.103515625e-05f) {  // subnormal: units of 2^-24, to nearest even
      bits = sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
    } else {
      wide &= 0x7fffffff;
      bits = sign | static_cast<uint16_t>((wide - 0x38000000 + 0xfff + (wide >> 13 & 1)) >> 13);
    }
    return *this;
  }
};

// A row that no key has reached yet has lse = -inf; it takes the partial as it is. Both sides are weighed: out -= w * (out -
// partial) would leave the rounding of a large partial behind even where it weighs nothing.
template <typename Sum, typename Partial>
void merge_row(Sum* out, Sum& lse, const Partial* partial, Sum partial_lse, int64_t width) {
  constexpr Sum kEmpty = -std::numeric_limits<Sum>::infinity();
  if (partial_lse == kEmpty) return;
  if (lse == kEmpty) {
    for (int64_t i = 0; i < width; ++i) out[i] = static_cast<Sum>(partial[i]);
    lse = partial_lse;
    return;
  }
  const Sum difference = partial_lse - lse;
  const Sum small = std::exp(-std::fabs(difference));  // never overflows
  const Sum more = Sum(1) / (Sum(1) + small), less = small / (Sum(1) + small);
  const Sum mine = difference > 0 ? less : more, theirs = difference > 0 ? more : less;
  for (int64_t i = 0; i < width; ++i) out[i] = mine * out[i] + theirs * static_cast<Sum>(partial[i]);
  lse = std::fmax(lse, partial_lse) + std::log1p(small);
}

template <typename T>
constexpr double kMost = std::numeric_limits<T>::max();
template <>
inline constexpr double kMost<BFloat16> = 3.38953138925153547590470800371487866880e38;
template <>
inline constexpr double kMost<Float16> = 65504.0;

// Adds what is missing of sum(grad * out) to one element of out.
template <typename Out, typename In, typename Sum>
void mend_element(Out* out, int64_t element, const In* grad, Sum missing) {
  const Sum mended = static_cast<Sum>(out[element]) + missing / static_cast<Sum>(grad[element]);
  constexpr Sum kLimit = static_cast<Sum>(kMost<Out>);
  if (std::isfinite(mended)) out[element] = std::clamp(mended, -kLimit, kLimit);
}

// An out with sum(grad * out) = delta, whatever the scale: all of delta goes into the element where grad is largest. A narrow
// out takes what rounding leaves of it in the second largest, or, where all
// of it would leave the range and is spread, in the largest.
template <typename Out, typename In, typename Sum>
void out_with_delta_row(Out* out, const In* grad, Sum delta, int64_t width) {
  constexpr bool kNarrow = sizeof(Out) < sizeof(Sum);
  int64_t best = 0, second = 0;
  Sum largest = -1, next = -1;
  for (int64_t i = 0; i < width; ++i) {
    out[i] = Sum(0);
    const Sum size = std::fabs(static_cast<Sum>(grad[i]));
    if (size > largest) {
      next = largest, second = best;
      largest = size, best = i;
    } else if (size > next) {
      next = size, second = i;
    }
  }
  if (delta == 0 || width == 0) return;
  out[best] = delta / static_cast<Sum>(grad[best]);
  const Sum stored = static_cast<Sum>(out[best]);
  if (std::isfinite(stored) || !std::isfinite(delta)) {
    if (kNarrow && next > 0 && std::isfinite(stored))
      mend_element(out, second, grad, delta - stored * static_cast<Sum>(grad[best]));
    return;
  }
  // The true out is near the end of its range: spread over all elements, none is larger than its largest one.
  double total = 0;
  for (int64_t i = 0; i < width; ++i) total += std::fabs(static_cast<double>(static_cast<Sum>(grad[i])));
  const double each = std::min<double>(std::fabs(static_cast<double>(delta)) / total, kMost<Out>);
  for (int64_t i = 0; i < width; ++i) {
    const bool same = std::signbit(static_cast<Sum>(grad[i])) == std::signbit(delta);
    out[i] = static_cast<Sum>(same ? each : -each);
  }
  if (kNarrow) {
    Sum found = 0;
    for (int64_t i = 0; i < width; ++i) found += static_cast<Sum>(grad[i]) * static_cast<Sum>(out[i]);
    mend_element(out, best, grad, delta - found);
  }
}

}  // namespace hdp
