// A row of a table of moves (see csrc/rows.cpp, which runs them), and how rows that follow each other become one.
#pragma once

#include <pybind11/numpy.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace hdp {

constexpr int kFields = 16;
using Row = std::array<int64_t, kFields>;
enum Field { kOp, kSource, kSourceRow, kSourceHead, kTarget, kTargetRow, kTargetHead, kRows, kHeads, kHasDim,
             kSource2, kSource2Row, kSource2Head, kTarget2, kTarget2Row, kTarget2Head };
enum Op : int64_t { kCopy, kAdd, kMerge };  // hdp.attention.lowered.Op

// Each tensor of a move: its number's column and its row's. The target comes second.
constexpr std::array<std::array<int, 2>, 4> kTensors{
    {{kSource, kSourceRow}, {kTarget, kTargetRow}, {kSource2, kSource2Row}, {kTarget2, kTarget2Row}}};

using Rows = pybind11::array_t<int64_t, pybind11::array::c_style | pybind11::array::forcecast>;

// A move without tensors.
inline Row blank(int64_t op) {
  Row row{};
  row[kOp] = op;
  row[kSource] = row[kSource2] = row[kTarget2] = -1;
  return row;
}

inline bool is_row_field(int field) {
  return std::any_of(kTensors.begin(), kTensors.end(), [&](const auto& t) { return t[1] == field; });
}

// Whether `next` goes on where `last` ends, in all its tensors.
inline bool follows(const Row& last, const Row& next) {
  for (int field = 0; field < kFields; ++field)
    if (field != kRows && !is_row_field(field) && last[field] != next[field]) return false;
  for (const auto& [number, row] : kTensors)
    if (next[row] - last[row] != (last[number] >= 0 ? last[kRows] : 0)) return false;
  return true;
}

// Joins a row to the last of a table, if that is one of those from `first` on and ends where the row begins.
inline bool join(std::vector<Row>& table, size_t first, const Row& row) {
  if (table.size() <= first || !follows(table.back(), row)) return false;
  table.back()[kRows] += row[kRows];
  return true;
}

inline pybind11::array_t<int64_t> as_array(const std::vector<Row>& table) {
  pybind11::array_t<int64_t> found({static_cast<pybind11::ssize_t>(table.size()), static_cast<pybind11::ssize_t>(kFields)});
  if (!table.empty()) std::copy_n(table.front().data(), table.size() * kFields, found.mutable_data());
  return found;
}

}  // namespace hdp
