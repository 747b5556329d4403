// Moves of rows between tensors on the CPU, a whole table of them in one call: copies, casts, sums, merges of attention
// partials, and outputs rebuilt from delta.
//
// A table says which rows and heads of which tensor go where; descriptors say where a tensor lies: address, elements from row
// to row and from head to head, and dtype. Tensors come as addresses, so that this file needs no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "partials.h"

namespace py = pybind11;

namespace {

enum Op : int64_t { kCopy, kAdd, kMerge, kRebuild, kZero, kEmpty };
enum Dtype : int64_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

using hdp::BFloat16;
using hdp::Float16;

struct Tensor {
  int64_t address, row, head, dtype;  // strides in elements
};

struct Move {
  int64_t op, source, source_row, source_head, target, target_row, target_head, rows, heads, has_dim;
  int64_t source2, source2_row, source2_head, target2, target2_row, target2_head;
};
static_assert(sizeof(Move) == 16 * sizeof(int64_t));

template <typename T>
T* at(const Tensor& t, int64_t row, int64_t head) {
  return reinterpret_cast<T*>(t.address) + row * t.row + head * t.head;
}

int64_t size_of(int64_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

template <typename To, typename From>
void add_rows(const Tensor& to, const Tensor& from, const Move& m, int64_t width) {
  for (int64_t row = 0; row < m.rows; ++row) {
    for (int64_t head = 0; head < m.heads; ++head) {
      To* t = at<To>(to, m.target_row + row, m.target_head + head);
      const From* f = at<From>(from, m.source_row + row, m.source_head + head);
      for (int64_t i = 0; i < width; ++i) t[i] += f[i];
    }
  }
}

template <typename To, typename From>
void cast_rows(const Tensor& to, const Tensor& from, const Move& m, int64_t width) {
  for (int64_t row = 0; row < m.rows; ++row) {
    for (int64_t head = 0; head < m.heads; ++head) {
      To* t = at<To>(to, m.target_row + row, m.target_head + head);
      const From* f = at<From>(from, m.source_row + row, m.source_head + head);
      for (int64_t i = 0; i < width; ++i) t[i] = static_cast<float>(f[i]);
    }
  }
}

void copy_same(const Tensor& to, const Tensor& from, const Move& m, int64_t width) {
  const int64_t size = size_of(to.dtype), bytes = m.heads * width * size;
  const bool dense = (m.heads == 1 || (to.head == width && from.head == width));
  char* t = reinterpret_cast<char*>(to.address) + (m.target_row * to.row + m.target_head * to.head) * size;
  const char* f = reinterpret_cast<const char*>(from.address) + (m.source_row * from.row + m.source_head * from.head) * size;
  if (dense && to.row == m.heads * width && from.row == m.heads * width) {
    std::memcpy(t, f, static_cast<size_t>(m.rows * bytes));
    return;
  }
  for (int64_t row = 0; row < m.rows; ++row, t += to.row * size, f += from.row * size) {
    if (dense) {
      std::memcpy(t, f, static_cast<size_t>(bytes));
      continue;
    }
    for (int64_t head = 0; head < m.heads; ++head) {
      std::memcpy(t + head * to.head * size, f + head * from.head * size, static_cast<size_t>(width * size));
    }
  }
}

template <typename To>
bool cast_from(const Tensor& to, const Tensor& from, const Move& m, int64_t width) {
  switch (from.dtype) {
    case kFloat32: cast_rows<To, float>(to, from, m, width); return true;
    case kBFloat16: cast_rows<To, BFloat16>(to, from, m, width); return true;
    case kFloat16: cast_rows<To, Float16>(to, from, m, width); return true;
    default: return false;
  }
}

bool copy(const Tensor& to, const Tensor& from, const Move& m, int64_t width) {
  if (to.dtype == from.dtype) {
    copy_same(to, from, m, width);
    return true;
  }
  switch (to.dtype) {
    case kFloat32: return cast_from<float>(to, from, m, width);
    case kBFloat16: return cast_from<BFloat16>(to, from, m, width);
    case kFloat16: return cast_from<Float16>(to, from, m, width);
    default: return false;
  }
}

bool add(const Tensor& to, const Tensor& from, const Move& m, int64_t width) {
  if (to.dtype == kFloat64 && from.dtype == kFloat64) {
    add_rows<double, double>(to, from, m, width);
  } else if (to.dtype == kFloat32 && from.dtype == kFloat32) {
    add_rows<float, float>(to, from, m, width);
  } else if (to.dtype == kFloat32 && from.dtype == kBFloat16) {
    add_rows<float, BFloat16>(to, from, m, width);
  } else if (to.dtype == kFloat32 && from.dtype == kFloat16) {
    add_rows<float, Float16>(to, from, m, width);
  } else {
    return false;
  }
  return true;
}

template <typename Sum, typename Partial>
void merge_rows(const Tensor& out, const Tensor& lse, const Tensor& partial, const Tensor& partial_lse, const Move& m,
                int64_t width) {
  for (int64_t row = 0; row < m.rows; ++row) {
    for (int64_t head = 0; head < m.heads; ++head) {
      hdp::merge_row(at<Sum>(out, m.target_row + row, m.target_head + head),
                     *at<Sum>(lse, m.target2_row + row, m.target2_head + head),
                     at<const Partial>(partial, m.source_row + row, m.source_head + head),
                     *at<Sum>(partial_lse, m.source2_row + row, m.source2_head + head), width);
    }
  }
}

bool merge(const Tensor& out, const Tensor& lse, const Tensor& partial, const Tensor& partial_lse, const Move& m,
           int64_t width) {
  if (out.dtype != lse.dtype || lse.dtype != partial_lse.dtype) return false;
  if (out.dtype == kFloat64 && partial.dtype == kFloat64) {
    merge_rows<double, double>(out, lse, partial, partial_lse, m, width);
  } else if (out.dtype == kFloat32 && partial.dtype == kFloat32) {
    merge_rows<float, float>(out, lse, partial, partial_lse, m, width);
  } else if (out.dtype == kFloat32 && partial.dtype == kBFloat16) {
    merge_rows<float, BFloat16>(out, lse, partial, partial_lse, m, width);
  } else if (out.dtype == kFloat32 && partial.dtype == kFloat16) {
    merge_rows<float, Float16>(out, lse, partial, partial_lse, m, width);
  } else {
    return false;
  }
  return true;
}

template <typename Out, typename In, typename Sum>
void rebuild_rows(const Tensor& out, const Tensor& grad, const Tensor& delta, const Move& m, int64_t width) {
  for (int64_t row = 0; row < m.rows; ++row) {
    for (int64_t head = 0; head < m.heads; ++head) {
      hdp::out_with_delta_row(at<Out>(out, m.target_row + row, m.target_head + head),
                              at<const In>(grad, m.source_row + row, m.source_head + head),
                              *at<Sum>(delta, m.source2_row + row, m.source2_head + head), width);
    }
  }
}

bool rebuild(const Tensor& out, const Tensor& grad, const Tensor& delta, const Move& m, int64_t width) {
  if (out.dtype == kFloat64 && grad.dtype == kFloat64 && delta.dtype == kFloat64) {
    rebuild_rows<double, double, double>(out, grad, delta, m, width);
  } else if (delta.dtype != kFloat32) {
    return false;
  } else if (out.dtype == kFloat32 && grad.dtype == kFloat32) {
    rebuild_rows<float, float, float>(out, grad, delta, m, width);
  } else if (out.dtype == kFloat32 && grad.dtype == kBFloat16) {
    rebuild_rows<float, BFloat16, float>(out, grad, delta, m, width);
  } else if (out.dtype == kFloat32 && grad.dtype == kFloat16) {
    rebuild_rows<float, Float16, float>(out, grad, delta, m, width);
  } else if (out.dtype == kBFloat16 && grad.dtype == kBFloat16) {
    rebuild_rows<BFloat16, BFloat16, float>(out, grad, delta, m, width);
  } else if (out.dtype == kFloat16 && grad.dtype == kFloat16) {
    rebuild_rows<Float16, Float16, float>(out, grad, delta, m, width);
  } else {
    return false;
  }
  return true;
}

void fill(const Tensor& to, const Move& m, int64_t width) {
  const bool empty = m.op == kEmpty;
  for (int64_t row = 0; row < m.rows; ++row) {
    for (int64_t head = 0; head < m.heads; ++head) {
      if (to.dtype == kFloat64) {
        std::fill_n(at<double>(to, m.target_row + row, m.target_head + head), width, empty ? -INFINITY : 0.0);
      } else if (to.dtype == kFloat32) {
        std::fill_n(at<float>(to, m.target_row + row, m.target_head + head), width, empty ? -INFINITY : 0.0f);
      } else {  // an empty lse is never narrow
        std::fill_n(at<uint16_t>(to, m.target_row + row, m.target_head + head), width, uint16_t(0));
      }
    }
  }
}

using Table = py::array_t<int64_t, py::array::c_style>;

// Runs moves [first, last) of a table, in order. `tensor` finds a descriptor by its number, or null.
template <typename Find>
void run_moves(const Find& tensor, const Move* all, int64_t first, int64_t last, int64_t dim) {
  int64_t bad = -1;
  {
    py::gil_scoped_release release;
    for (int64_t i = first; i < last && bad < 0; ++i) {
      const Move& m = all[i];
      const int64_t width = m.has_dim ? dim : 1;
      const Tensor* target = tensor(m.target);
      const Tensor* source = m.source < 0 ? nullptr : tensor(m.source);
      const Tensor* source2 = m.source2 < 0 ? nullptr : tensor(m.source2);
      const Tensor* target2 = m.target2 < 0 ? nullptr : tensor(m.target2);
      bool done = target != nullptr;
      if (done) {
        switch (m.op) {
          case kCopy: done = source && copy(*target, *source, m, width); break;
          case kAdd: done = source && add(*target, *source, m, width); break;
          case kMerge:
            done = source && source2 && target2 && merge(*target, *target2, *source, *source2, m, width);
            break;
          case kRebuild: done = source && source2 && rebuild(*target, *source, *source2, m, width); break;
          case kZero:
          case kEmpty: fill(*target, m, width); break;
          default: done = false;
        }
      }
      if (!done) bad = i;
    }
  }
  if (bad >= 0) throw std::invalid_argument("rows: move " + std::to_string(bad) + " is none that tensors of these dtypes allow");
}

void run(const Table& tensors, const Table& moves, int64_t dim) {
  const auto* known = reinterpret_cast<const Tensor*>(tensors.data());
  const int64_t count = tensors.shape(0);
  const auto find = [=](int64_t n) { return n >= 0 && n < count ? known + n : nullptr; };
  run_moves(find, reinterpret_cast<const Move*>(moves.data()), 0, moves.shape(0), dim);
}

// Results of kernels are numbered behind the tensors and `skipped` other results. `lies`: row, head and dtype of each.
void run_results(const Table& tensors, const std::vector<int64_t>& addresses, const Table& lies, int64_t skipped,
                 const Table& moves, int64_t dim, int64_t first, int64_t last) {
  const auto* known = reinterpret_cast<const Tensor*>(tensors.data());
  const int64_t count = tensors.shape(0), made = static_cast<int64_t>(addresses.size());
  if (first < 0 || last > moves.shape(0)) throw std::out_of_range("rows.run_results: no such moves");
  if (lies.shape(0) != made) throw std::invalid_argument("rows.run_results: as many addresses as results");
  std::vector<Tensor> results(addresses.size());
  const int64_t* lie = lies.data();
  for (int64_t i = 0; i < made; ++i) results[i] = {addresses[i], lie[3 * i], lie[3 * i + 1], lie[3 * i + 2]};
  const Tensor* behind = results.data();
  const auto find = [=](int64_t n) -> const Tensor* {
    if (n < 0) return nullptr;
    if (n < count) return known + n;
    n -= count + skipped;
    return n >= 0 && n < made ? behind + n : nullptr;
  };
  run_moves(find, reinterpret_cast<const Move*>(moves.data()), first, last, dim);
}

}  // namespace

PYBIND11_MODULE(_rows, m) {
  m.doc() = "Tables of moves of rows between tensors on the CPU.";
  m.def("run", &run, "Runs a table of moves between tensors given by descriptors.");
  m.def("run_results", &run_results, "Runs moves [first, last) of a table, some of whose tensors are results of kernels.");
}
