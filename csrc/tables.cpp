// Tables of moves (see csrc/rows.cpp, which runs them): moves of one bundle of documents written out for each document.
//
// A move says which tensors it joins; arrays say at which row of each of them every document begins, and where it ends in the
// target. Moves that go on where the one before ends become one.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "tables.h"

namespace py = pybind11;

namespace {

using namespace hdp;

struct Move {
  Row row;
  std::array<Rows, 4> starts;  // by tensor; empty where there is none
  Rows stops;
};

std::vector<Move> parse(const py::list& moves) {
  std::vector<Move> parsed;
  parsed.reserve(moves.size());
  for (const py::handle one : moves) {
    const auto& [row, starts, stops] = one.cast<std::tuple<py::tuple, py::tuple, Rows>>();
    Move& move = parsed.emplace_back();
    if (row.size() != kFields || starts.size() > kTensors.size()) throw std::invalid_argument("tables: no move");
    for (int field = 0; field < kFields; ++field) move.row[field] = row[field].cast<int64_t>();
    for (size_t n = 0; n < starts.size(); ++n) {
      if (starts[n].is_none()) continue;
      move.starts[n] = starts[n].cast<Rows>();
      if (move.starts[n].size() != stops.size()) throw std::invalid_argument("tables: unlike numbers of documents");
    }
    move.stops = stops;
    if (move.starts[1].size() != stops.size()) throw std::invalid_argument("tables: a move without a target");
  }
  return parsed;
}

// One document of a move, added to the rows that belong together from `first` on.
void add(std::vector<Row>& table, size_t first, const Move& move, int64_t document, int64_t launch) {
  const int64_t count = move.stops.at(document) - move.starts[1].at(document);
  if (count <= 0) return;
  Row row = move.row;
  row[kRows] = count;
  for (size_t n = 0; n < kTensors.size(); ++n)
    if (move.starts[n].size()) row[kTensors[n][1]] = move.starts[n].at(document);
  if (launch > 0) {
    row[kSource] += launch;
    if (row[kSource2] >= 0) row[kSource2] += launch;
  }
  if (!join(table, first, row)) table.push_back(row);
}

// Moves, each document by document.
py::array_t<int64_t> expand(const py::list& moves) {
  std::vector<Row> table;
  for (const Move& move : parse(moves))
    for (int64_t document = 0; document < move.stops.size(); ++document) add(table, 0, move, document, 0);
  return as_array(table);
}

// Moves of what launches return: launch by launch all moves, each document by document. `launch`: that of each document,
// ascending. Returns the table and the [launches + 1] rows at which each launch's begin.
py::tuple expand_results(const py::list& moves, const Rows& launch, int64_t components) {
  const std::vector<Move> parsed = parse(moves);
  const int64_t documents = launch.size();
  for (const Move& move : parsed)
    if (move.stops.size() != documents) throw std::invalid_argument("tables: unlike numbers of documents");
  std::vector<Row> table;
  std::vector<int64_t> bounds{0};
  for (int64_t first = 0, last = 0; first < documents; first = last) {
    const int64_t number = launch.at(first);
    while (last < documents && launch.at(last) == number) ++last;
    const size_t begin = table.size();
    for (const Move& move : parsed)
      for (int64_t document = first; document < last; ++document) add(table, begin, move, document, number * components);
    bounds.push_back(static_cast<int64_t>(table.size()));
  }
  py::array_t<int64_t> ends(static_cast<py::ssize_t>(bounds.size()));
  std::copy(bounds.begin(), bounds.end(), ends.mutable_data());
  return py::make_tuple(as_array(table), ends);
}

// Rows and heads of one tensor, or all of it as others see that share memory with it.
struct Access {
  int64_t tensor, row, rows, head, heads;
  bool writes;
  int64_t wave;
};

bool conflict(const Access& a, const Access& b) {
  if (!a.writes && !b.writes) return false;
  if (a.tensor != b.tensor) return true;  // of one memory
  return a.row < b.row + b.rows && b.row < a.row + a.rows && a.head < b.head + b.heads && b.head < a.head + a.heads;
}

// What was touched of one memory; most accesses lie behind all earlier ones of their tensor.
struct Memory {
  int64_t tensor = -1;
  bool shared = false;
  int64_t end = 0;
  std::vector<Access> accesses;

  int64_t wave_after(const Access& next) const {
    if (!shared && (tensor < 0 || (tensor == next.tensor && next.row >= end))) return 0;
    int64_t wave = 0;
    for (const Access& before : accesses)
      if (before.wave >= wave && conflict(before, next)) wave = before.wave + 1;
    return wave;
  }

  void add(const Access& access) {
    shared |= tensor >= 0 && tensor != access.tensor;
    tensor = access.tensor;
    end = std::max(end, access.row + access.rows);
    accesses.push_back(access);
  }
};

// The wave of each move: moves of one wave touch nothing that another of them writes, and come after those of earlier waves
// that do. `places` [tensors, 3]: memory, first byte, end of each tensor; tensors beyond are read only.
py::array_t<int64_t> waves(const Rows& table, const Rows& places) {
  const int64_t moves = table.shape(0), tensors = places.shape(0);
  // Tensors whose bytes overlap share one memory.
  std::vector<int64_t> order(tensors), memory(tensors);
  for (int64_t n = 0; n < tensors; ++n) order[n] = n;
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return std::pair(places.at(a, 0), places.at(a, 1)) < std::pair(places.at(b, 0), places.at(b, 1));
  });
  int64_t count = 0, end = 0;
  for (int64_t n = 0; n < tensors; ++n) {
    const int64_t one = order[n];
    const bool joins = n && places.at(order[n - 1], 0) == places.at(one, 0) && places.at(one, 1) < end;
    if (!joins) ++count, end = 0;
    end = std::max(end, places.at(one, 2));
    memory[one] = count - 1;
  }
  std::vector<Memory> all(count);
  py::array_t<int64_t> found(moves);
  for (int64_t i = 0; i < moves; ++i) {
    const int64_t* move = table.data(i, 0);
    std::array<Access, 4> accesses;
    int used = 0;
    int64_t wave = 0;
    for (const auto& [number, row] : kTensors) {
      const int64_t tensor = move[number];
      if (tensor < 0 || tensor >= tensors) continue;
      const bool writes = number == kTarget || number == kTarget2;
      accesses[used] = {tensor, move[row], move[kRows], move[row + 1], move[kHeads], writes, 0};
      wave = std::max(wave, all[memory[tensor]].wave_after(accesses[used++]));
    }
    for (int n = 0; n < used; ++n) {
      accesses[n].wave = wave;
      all[memory[accesses[n].tensor]].add(accesses[n]);
    }
    found.mutable_at(i) = wave;
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_tables, m) {
  m.doc() = "Tables of moves for all documents of a bundle.";
  m.def("expand", &expand, "Moves written out for each document, those that follow each other joined.");
  m.def("waves", &waves, "Which moves of a table may be run together.");
  m.def("expand_results", &expand_results, "The same for what kernel launches return, launch by launch.");
}
